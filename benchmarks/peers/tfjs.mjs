// Attention, sampling and the policy loss by TensorFlow.js on the arrays that merf is measured on: on its native backend
// where @tensorflow/tfjs-node is installed and found its library, else on WebAssembly (@tensorflow/tfjs-backend-wasm).
import { createRequire } from 'node:module';
import { dirname, join, sep } from 'node:path';

/** TensorFlow.js as `folder` has it, and how it calls itself. */
export async function load(folder) {
  const require = createRequire(join(folder, 'x.js'));
  try {
    const tf = require('@tensorflow/tfjs-node');
    return { tf, name: `tfjs-node ${tf.version['tfjs-node']}` };
  } catch {
    const tf = require('@tensorflow/tfjs');
    const wasm = require('@tensorflow/tfjs-backend-wasm');
    wasm.setWasmPaths(dirname(require.resolve('@tensorflow/tfjs-backend-wasm')) + sep);
    await tf.setBackend('wasm');
    await tf.ready();
    return { tf, name: `tfjs ${tf.version.tfjs} (${tf.getBackend()})` };
  }
}

/** What it can do, from typed arrays to typed arrays. */
export function contestant(tf, inputs, sizes) {
  const { tokens, heads, headSize, batch, rows, hidden, vocabulary } = sizes;
  const read = async (tensors) => {
    const arrays = await Promise.all(tensors.map((tensor) => tensor.data()));
    tf.dispose(tensors);
    return arrays;
  };
  const attend = (visibleUntil) => {
    const mask = new Float32Array(tokens * tokens);
    for (let i = 0; i < tokens; i++) {
      for (let j = 0; j < tokens; j++) mask[i * tokens + j] = j <= i && i < visibleUntil[j] ? 0 : -1e9;
    }
    const bias = tf.tensor(mask, [tokens, tokens]);
    const run = async () => {
      const given = tf.tidy(() =>
        [inputs.q, inputs.k, inputs.v].map((x) => tf.tensor(x, [tokens, heads, headSize])),
      );
      const out = tf.tidy(() => {
        const forward = (q, k, v) => {
          const [a, b, c] = [q, k, v].map((x) => tf.transpose(x, [1, 0, 2]));
          const scores = tf.add(tf.mul(tf.matMul(a, b, false, true), 1 / Math.sqrt(headSize)), bias);
          return tf.transpose(tf.matMul(tf.softmax(scores), c), [1, 0, 2]);
        };
        // The value and its gradient in one pass: the output is kept as it goes by.
        let value;
        const dout = tf.tensor(inputs.dout, [tokens, heads, headSize]);
        const { grads } = tf.valueAndGrads((q, k, v) => {
          value = tf.keep(forward(q, k, v));
          return tf.sum(tf.mul(value, dout));
        })(given);
        return [value, ...grads];
      });
      tf.dispose(given);
      return read(out);
    };
    return run;
  };
  return {
    attention: attend(inputs.causal),
    'attention over a forest': attend(inputs.forest),
    sampling: async () => {
      const drawn = tf.tidy(() => tf.multinomial(tf.tensor(inputs.logits, [batch, vocabulary]), 1, 1, false));
      const [tokens_] = await read([drawn]);
      return [Float32Array.from(tokens_)];
    },
    'policy loss': async () => {
      const out = tf.tidy(() => {
        // TensorFlow.js has no gradient of gatherND, so the targets are chosen by a product.
        const ones = new Float32Array(rows * vocabulary);
        for (let r = 0; r < rows; r++) ones[r * vocabulary + inputs.targets[r]] = 1;
        const chosen = tf.tensor(ones, [rows, vocabulary]);
        const advantages = tf.tensor1d(inputs.advantages);
        const old = tf.tensor1d(inputs.oldLogprobs);
        const { value, grads } = tf.valueAndGrads((states, head) => {
          const logits = tf.matMul(states, head, false, true);
          const logprobs = tf.sum(tf.mul(tf.logSoftmax(logits), chosen), 1);
          const ratio = tf.exp(tf.sub(logprobs, old));
          const clipped = tf.clipByValue(ratio, 0.8, 1.2);
          return tf.neg(tf.mean(tf.minimum(tf.mul(ratio, advantages), tf.mul(clipped, advantages))));
        })([tf.tensor(inputs.states, [rows, hidden]), tf.tensor(inputs.head, [vocabulary, hidden])]);
        return [value, ...grads];
      });
      return read(out);
    },
  };
}
