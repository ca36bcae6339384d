// merf/kernels on the emulated GPU beside the CPU. The native tests hold every operator to float64; these show that
// the same calls reach the device's own kernels.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import {
  attention,
  attentionBackward,
  type Device,
  fusedPolicyLoss,
  groupAdvantages,
  openDevice,
  policyLoss,
  sampleTokens,
  type Tensor,
} from '../../lib/kernels/index.js';
import { native } from '../../lib/native.js';
import { root } from '../cli/run.js';
import { expectFailure, random } from '../policy/helpers.js';

function numbers(length: number, seed: number): Float32Array {
  const next = random(seed);
  return Float32Array.from({ length }, () => 2 * next() - 1);
}

async function read(tensors: Record<string, Tensor | number>): Promise<Record<string, number[]>> {
  const values: Record<string, number[]> = {};
  for (const [name, tensor] of Object.entries(tensors)) {
    values[name] = typeof tensor === 'number' ? [tensor] : Array.from(await tensor.read());
  }
  return values;
}

/** `run` on both devices; everything it gives agrees, relative to the greatest magnitude of each tensor. */
async function agree(
  run: (device: Device) => Promise<Record<string, Tensor | number>>,
  tolerance: number,
): Promise<void> {
  const expected = await read(await run(openDevice('cpu')));
  const actual = await read(await run(openDevice('cuda-emulated')));
  expect(Object.keys(actual)).toEqual(Object.keys(expected));
  for (const [name, values] of Object.entries(expected)) {
    const scale = Math.max(1e-3, ...values.map(Math.abs));
    const others = actual[name] as number[];
    expect(others.length).toBe(values.length);
    const worst = Math.max(...values.map((value, i) => Math.abs(value - (others[i] as number)) / scale));
    expect({ name, close: worst <= tolerance, worst }).toMatchObject({ name, close: true });
  }
}

describe('the emulated GPU agrees with the CPU', () => {
  test.each([
    ['f32', 2e-5],
    ['bf16', 1e-2],
  ] as const)('attention, forward and backward, in %s', async (dtype, tolerance) => {
    const [T, Hq, Hk, D] = [23, 4, 2, 32];
    const visibleUntil = Int32Array.from({ length: T }, (_, i) => (i < 9 ? T : i < 16 ? 16 : T));
    await agree(async (device) => {
      const tensor = (heads: number, seed: number) =>
        device.tensor(numbers(T * heads * D, seed), { shape: [T, heads, D], dtype });
      const args = { q: tensor(Hq, 1), k: tensor(Hk, 2), v: tensor(Hk, 3), visibleUntil };
      const forward = await attention(args);
      const backward = await attentionBackward({ ...args, ...forward, dout: tensor(Hq, 4) });
      return { ...forward, ...backward };
    }, tolerance);
  });

  test('sampleTokens draws the same tokens', async () => {
    const [B, V] = [6, 300];
    for (const options of [{ temperature: 0 }, {}, { temperature: 0.8, topK: 40, topP: 0.9, minP: 0.01 }]) {
      await agree(async (device) => {
        const drawn = await sampleTokens({
          logits: device.tensor(
            numbers(B * V, 5).map((x) => 6 * x),
            { shape: [B, V] },
          ),
          keys: Uint32Array.from({ length: 2 * B }, (_, i) => i * 7919),
          positions: Int32Array.from({ length: B }, (_, i) => i),
          seed: 11,
          ...options,
        });
        return { ...drawn };
      }, 1e-5);
      const [cpu, gpu] = await Promise.all(
        ['cpu', 'cuda-emulated'].map(async (name) => {
          const device = openDevice(name);
          const logits = device.tensor(numbers(B * V, 6), { shape: [B, V] });
          const keys = new Uint32Array(2 * B).fill(3);
          const positions = Int32Array.from({ length: B }, (_, i) => i);
          const { tokens } = await sampleTokens({ logits, keys, positions, seed: 2, ...options });
          return Array.from(await tokens.read());
        }),
      );
      expect(gpu).toEqual(cpu);
    }
  });

  test.each(['group', 'batch', 'leave_one_out'] as const)('groupAdvantages by %s', async (kind) => {
    await agree(async (device) => {
      const rewards = device.tensor(numbers(12, 7));
      return { out: await groupAdvantages({ rewards, groupOffsets: Int32Array.of(0, 4, 5, 12), kind }) };
    }, 1e-5);
  });

  const lossRows = (device: Device, R: number) => ({
    weights: device.tensor(numbers(R, 8).map((x) => 0.1 + x * x)),
    advantages: device.tensor(numbers(R, 9)),
    oldLogprobs: device.tensor(numbers(R, 10).map((x) => x - 3)),
    referenceLogprobs: device.tensor(numbers(R, 11).map((x) => x - 3)),
    klCoefficient: 0.05,
    entropyCoefficient: 0.01,
  });

  test.each(['policy_gradient_clip', 'cispo', 'gspo'] as const)('policyLoss of %s', async (kind) => {
    const R = 17;
    await agree(async (device) => {
      const { loss, coefficients } = await policyLoss({
        ...lossRows(device, R),
        kind,
        ...(kind === 'gspo' && { sequences: Int32Array.from({ length: R }, (_, i) => Math.floor(i / 5)) }),
        logprobs: device.tensor(numbers(R, 12).map((x) => x - 3)),
        entropies: device.tensor(numbers(R, 13).map((x) => 2 + x)),
      });
      return { loss, coefficients };
    }, 1e-5);
  });

  test.each([
    ['f32', 2e-5],
    ['bf16', 2e-2],
  ] as const)('fusedPolicyLoss in %s', async (dtype, tolerance) => {
    const [T, H, V, R] = [9, 32, 200, 17];
    await agree(async (device) => {
      const { loss, ...tensors } = await fusedPolicyLoss({
        ...lossRows(device, R),
        hidden: device.tensor(numbers(T * H, 14), { shape: [T, H], dtype }),
        weight: device.tensor(
          numbers(V * H, 15).map((x) => x / 3),
          { shape: [V, H], dtype },
        ),
        rows: Int32Array.from({ length: R }, (_, i) => (i * 5) % T),
        targets: Int32Array.from({ length: R }, (_, i) => (i * 37) % V),
      });
      return { loss, ...tensors };
    }, tolerance);
  });
});

describe('a device', () => {
  test('that is not there is refused with the reason', async () => {
    const { available, reason } = native().describeDevice('cuda');
    // A machine with a GPU has no such failure to show; tests/devices/driver.test.ts makes them up.
    if (available) return;
    await expectFailure(() => openDevice('cuda'), 'DEVICE_UNAVAILABLE', /driver|GPU|merf_cuda/);
    expect(reason).toMatch(/driver|GPU|merf_cuda/);
  });

  test('emulated, may be left by processes and worker threads in the midst of work', () => {
    const addon = join(root, 'build', 'Release', 'merf.node');
    const work = `
      const addon = require(${JSON.stringify(addon)});
      const device = addon.openDevice({ name: 'cuda-emulated', threads: 1 });
      const T = 96, heads = 2, size = 16;
      const q = device.tensor(new Float32Array(T * heads * size).fill(0.1), [T, heads, size], 'f32');
      const visibleUntil = new Int32Array(T).fill(T);
      const attend = () => device.attention({ q, k: q, v: q, visibleUntil });`;
    const worker = `${work}
      const { parentPort } = require('node:worker_threads');
      attend().then(() => {
        parentPort.postMessage('working');
        for (let i = 0; i < 200; ++i) attend();
        q.dispose();
      });`;
    const script = `${work}
      const { Worker } = require('node:worker_threads');
      const ended = () => new Promise((done) => {
        const thread = new Worker(${JSON.stringify(worker)}, { eval: true });
        thread.on('message', () => setTimeout(() => thread.terminate(), 10));
        thread.on('error', (error) => console.log('error', error.message));
        thread.on('exit', done);
      });
      (async () => {
        await Promise.all([ended(), ended()]);
        const { out } = await attend();
        console.log((await out.read()).length);
        for (let i = 0; i < 200; ++i) attend();
        setTimeout(() => process.exit(7), 10);
      })();`;
    const { status, signal, stdout, stderr } = spawnSync(process.execPath, ['-e', script], {
      encoding: 'utf8',
      timeout: 60_000,
    });
    expect({ status, signal, stdout, stderr }).toEqual({
      status: 7,
      signal: null,
      stdout: `${96 * 2 * 16}\n`,
      stderr: '',
    });
  }, 90_000);
});
