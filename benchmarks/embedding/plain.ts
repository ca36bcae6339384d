// What a trainer without merf would write in JavaScript, over Float32Arrays: the same results as the kernels, by loops.

export interface AttentionSizes {
  tokens: number;
  heads: number;
  headSize: number;
}

/** softmax(q k^T / sqrt(head size)) v, [tokens, heads, head size] each; lse [heads, tokens]. */
export function attention(
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
  visibleUntil: Int32Array,
  { tokens, heads, headSize }: AttentionSizes,
): { out: Float32Array; lse: Float32Array } {
  const out = new Float32Array(q.length);
  const lse = new Float32Array(heads * tokens);
  const weights = new Float32Array(tokens);
  const scale = 1 / Math.sqrt(headSize);
  const stride = heads * headSize;
  for (let h = 0; h < heads; h++) {
    for (let i = 0; i < tokens; i++) {
      const qi = i * stride + h * headSize;
      let most = Number.NEGATIVE_INFINITY;
      for (let j = 0; j <= i; j++) {
        weights[j] = Number.NEGATIVE_INFINITY;
        if (i >= (visibleUntil[j] as number)) continue;
        const kj = j * stride + h * headSize;
        let score = 0;
        for (let d = 0; d < headSize; d++) score += (q[qi + d] as number) * (k[kj + d] as number);
        weights[j] = score * scale;
        if (score * scale > most) most = score * scale;
      }
      let sum = 0;
      for (let j = 0; j <= i; j++) {
        const weight = Math.exp((weights[j] as number) - most);
        weights[j] = weight;
        sum += weight;
      }
      for (let j = 0; j <= i; j++) {
        const weight = (weights[j] as number) / sum;
        if (weight === 0) continue;
        const vj = j * stride + h * headSize;
        for (let d = 0; d < headSize; d++) {
          out[qi + d] = (out[qi + d] as number) + weight * (v[vj + d] as number);
        }
      }
      lse[h * tokens + i] = most + Math.log(sum);
    }
  }
  return { out, lse };
}

/** The gradients of `attention`, given its results and the gradient of `out`. */
export function attentionBackward(
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
  visibleUntil: Int32Array,
  { out, lse, dout }: { out: Float32Array; lse: Float32Array; dout: Float32Array },
  { tokens, heads, headSize }: AttentionSizes,
): { dq: Float32Array; dk: Float32Array; dv: Float32Array } {
  const [dq, dk, dv] = [q, k, v].map(({ length }) => new Float32Array(length)) as [
    Float32Array,
    Float32Array,
    Float32Array,
  ];
  const scale = 1 / Math.sqrt(headSize);
  const stride = heads * headSize;
  for (let h = 0; h < heads; h++) {
    for (let i = 0; i < tokens; i++) {
      const qi = i * stride + h * headSize;
      let through = 0;
      for (let d = 0; d < headSize; d++) through += (out[qi + d] as number) * (dout[qi + d] as number);
      for (let j = 0; j <= i; j++) {
        if (i >= (visibleUntil[j] as number)) continue;
        const kj = j * stride + h * headSize;
        let [score, along] = [0, 0];
        for (let d = 0; d < headSize; d++) {
          score += (q[qi + d] as number) * (k[kj + d] as number);
          along += (dout[qi + d] as number) * (v[kj + d] as number);
        }
        const weight = Math.exp(score * scale - (lse[h * tokens + i] as number));
        const slope = weight * (along - through) * scale;
        for (let d = 0; d < headSize; d++) {
          dq[qi + d] = (dq[qi + d] as number) + slope * (k[kj + d] as number);
          dk[kj + d] = (dk[kj + d] as number) + slope * (q[qi + d] as number);
          dv[kj + d] = (dv[kj + d] as number) + weight * (dout[qi + d] as number);
        }
      }
    }
  }
  return { dq, dk, dv };
}

/** A token from each row of logits [rows, vocabulary], drawn with the row's number in [0, 1). */
export function sampleTokens(logits: Float32Array, vocabulary: number, drawn: Float32Array): Int32Array {
  return Int32Array.from(drawn, (share, row) => {
    const of = logits.subarray(row * vocabulary, (row + 1) * vocabulary);
    let most = Number.NEGATIVE_INFINITY;
    for (const logit of of) if (logit > most) most = logit;
    let sum = 0;
    for (const logit of of) sum += Math.exp(logit - most);
    let left = share * sum;
    for (let token = 0; token < vocabulary; token++) {
      left -= Math.exp((of[token] as number) - most);
      if (left < 0) return token;
    }
    return vocabulary - 1;
  });
}

/**
 * The clipped loss (arXiv:1707.06347) of rows [rows, hidden] under a head [vocabulary, hidden], the mean over rows, and its
 * gradients.
 */
export function policyLoss(
  rows: Float32Array,
  head: Float32Array,
  targets: Int32Array,
  advantages: Float32Array,
  oldLogprobs: Float32Array,
  hidden: number,
): { loss: number; dhidden: Float32Array; dweight: Float32Array } {
  const vocabulary = head.length / hidden;
  const dhidden = new Float32Array(rows.length);
  const dweight = new Float32Array(head.length);
  const logits = new Float32Array(vocabulary);
  let loss = 0;
  for (const [r, target] of targets.entries()) {
    let most = Number.NEGATIVE_INFINITY;
    for (let v = 0; v < vocabulary; v++) {
      let logit = 0;
      for (let i = 0; i < hidden; i++)
        logit += (rows[r * hidden + i] as number) * (head[v * hidden + i] as number);
      logits[v] = logit;
      if (logit > most) most = logit;
    }
    let sum = 0;
    for (const logit of logits) sum += Math.exp(logit - most);
    const lse = most + Math.log(sum);
    const advantage = advantages[r] as number;
    const ratio = Math.exp((logits[target] as number) - lse - (oldLogprobs[r] as number));
    const clipped = Math.min(Math.max(ratio, 0.8), 1.2) * advantage;
    loss -= Math.min(ratio * advantage, clipped) / targets.length;
    const slope = ratio * advantage <= clipped ? (-ratio * advantage) / targets.length : 0;
    for (let v = 0; v < vocabulary; v++) {
      const dlogit = slope * ((v === target ? 1 : 0) - Math.exp((logits[v] as number) - lse));
      for (let i = 0; i < hidden; i++) {
        dhidden[r * hidden + i] =
          (dhidden[r * hidden + i] as number) + dlogit * (head[v * hidden + i] as number);
        dweight[v * hidden + i] =
          (dweight[v * hidden + i] as number) + dlogit * (rows[r * hidden + i] as number);
      }
    }
  }
  return { loss, dhidden, dweight };
}
