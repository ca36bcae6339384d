import { cancellable } from '../native.js';
import { type FloatDType, kernelCall, type Tensor } from './device.js';

export interface AttentionArguments {
  /** [T, query heads, head size], f32 or bf16; head size a multiple of 8. */
  q: Tensor<FloatDType>;
  /** [T, key/value heads, head size]; query heads are a multiple of them, as in grouped-query attention. */
  k: Tensor<FloatDType>;
  /** Has the shape and dtype of k. */
  v: Tensor<FloatDType>;
  /**
   * [T], the token forest's mask: key j is visible to query i exactly when j <= i < visibleUntil[j]. All T: one causal
   * row. The end of its row: packed rows. The end of its subtree: rows that share prefixes. Stretches are nested.
   */
  visibleUntil: Int32Array;
  /** Default 1 / sqrt(head size). */
  scale?: number | undefined;
  /** Ends the kernel early: on the CPU in its midst, on other devices before it begins. */
  signal?: AbortSignal | undefined;
}

export interface AttentionResult {
  /** Has the shape and dtype of q. */
  out: Tensor<FloatDType>;
  /** [query heads, T] f32, log-sum-exp of the scaled scores: what the backward needs. */
  lse: Tensor<FloatDType>;
}

export interface AttentionGradients {
  dq: Tensor<FloatDType>;
  dk: Tensor<FloatDType>;
  dv: Tensor<FloatDType>;
}

/**
 * softmax(scale * q k^T) v over the token forest; blocks that the mask empties are skipped and memory is linear in T.
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY, ABORTED
 */
export async function attention(args: AttentionArguments): Promise<AttentionResult> {
  const call = kernelCall(args.q, 'q');
  const { out, lse } = await cancellable('attention', args.signal, (cancel) =>
    call.device.attention(
      {
        q: call.handle(args.q, 'q'),
        k: call.handle(args.k, 'k'),
        v: call.handle(args.v, 'v'),
        visibleUntil: args.visibleUntil,
        scale: args.scale,
      },
      cancel,
    ),
  );
  return { out: call.tensor(out), lse: call.tensor(lse) };
}

/**
 * The gradients of `attention`'s inputs, given its results and the gradient of `out`.
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY, ABORTED
 */
export async function attentionBackward(
  args: AttentionArguments &
    AttentionResult & { /** Has the shape and dtype of q. */ dout: Tensor<FloatDType> },
): Promise<AttentionGradients> {
  const call = kernelCall(args.q, 'q');
  const { dq, dk, dv } = await cancellable('attentionBackward', args.signal, (cancel) =>
    call.device.attentionBackward(
      {
        q: call.handle(args.q, 'q'),
        k: call.handle(args.k, 'k'),
        v: call.handle(args.v, 'v'),
        visibleUntil: args.visibleUntil,
        scale: args.scale,
        out: call.handle(args.out, 'out'),
        lse: call.handle(args.lse, 'lse'),
        dout: call.handle(args.dout, 'dout'),
      },
      cancel,
    ),
  );
  return { dq: call.tensor(dq), dk: call.tensor(dk), dv: call.tensor(dv) };
}
