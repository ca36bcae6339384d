import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { type NativeModel, type NativeTensor, native } from '../../lib/native.js';
import { batch, config, cpu, loss, optimizer, request } from './tiny-model.js';

const token = () => native().createCancelToken();

async function makeModel(): Promise<NativeModel> {
  const model = native().createModel(config, cpu, true);
  await model.initialize(1n, 0.3);
  return model;
}

/** The same object, whose property `key` calls `then` when it is read. */
function trapped<T extends object>(object: T, key: string, then: () => void): T {
  const copy = { ...object };
  const value = copy[key as keyof T];
  Object.defineProperty(copy, key, {
    get: () => {
      then();
      return value;
    },
  });
  return copy;
}

/** An array that calls `then` when its first element is read. */
function trappedArray<T>(array: T[], then: () => void): T[] {
  const copy = [...array];
  const [first] = copy;
  Object.defineProperty(copy, 0, {
    get: () => {
      then();
      return first;
    },
  });
  return copy;
}

describe('a getter that disposes of the model while its argument is read', () => {
  const { targets: _, ...rows } = batch;
  const methods: [string, object, (model: NativeModel, argument: never) => Promise<unknown>][] = [
    ['logits', rows, (model, argument) => model.logits(argument)],
    ['score', batch, (model, argument) => model.score(argument, token())],
    ['forwardBackward', batch, (model, argument) => model.forwardBackward(argument, loss, token())],
    ['forwardBackward loss', loss, (model, argument) => model.forwardBackward(batch, argument, token())],
    ['optimStep', optimizer, (model, argument) => model.optimStep(argument)],
    ['sample', request, (model, argument) => model.sample(argument, token())],
  ];
  const cases = methods.flatMap(([name, argument, call]) =>
    Object.keys(argument).map((key) => [name, key, argument, call] as const),
  );

  // The call was made before, so that it has what a model gives that nobody disposes of.
  test.each(cases)('%s: %s', async (_name, key, argument, call) => {
    const whole = await makeModel();
    const wanted = await call(whole, argument as never);
    whole.dispose();
    const model = await makeModel();
    expect(await call(model, trapped(argument, key, () => model.dispose()) as never)).toEqual(wanted);
    expect(() => model.memory()).toThrow(MerfError);
  });

  test('and then fails leaves the engine as it was', async () => {
    const model = await makeModel();
    const wrong = trapped({ ...optimizer, beta2: 1 }, 'learningRate', () => model.dispose());
    await expect(model.optimStep(wrong)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    const other = await makeModel();
    expect((await other.score(batch, token())).logprobs).toHaveLength(4);
    other.dispose();
  });
});

describe('a getter that disposes of a tensor', () => {
  test('while the arguments of a kernel are read', async () => {
    const device = native().openDevice(cpu);
    const make = () => device.tensor(new Float32Array(32).fill(0.5), [4, 1, 8], 'f32');
    for (const key of ['q', 'k', 'v', 'visibleUntil', 'scale']) {
      const tensors = { q: make(), k: make(), v: make() };
      const all = Object.values(tensors);
      const whole = { ...tensors, visibleUntil: Int32Array.of(4, 4, 4, 4), scale: 1 };
      const argument = trapped(whole, key, () => {
        for (const tensor of all) tensor.dispose();
      });
      const outcome = await device.attention(argument).then(
        ({ out }) => out.shape,
        (error: MerfError) => error.code,
      );
      // Tensors are taken in their order: what was disposed of before its turn is refused.
      expect(outcome).toEqual(key === 'visibleUntil' || key === 'scale' ? [4, 1, 8] : 'DISPOSED');
    }
  });

  test('while its shape is written', () => {
    const tensor = native().openDevice(cpu).tensor(null, [2, 3], 'f32');
    // The arrays of the addon are those of the main context.
    const prototype = Object.getPrototypeOf(tensor.shape) as object;
    Object.defineProperty(prototype, 0, { configurable: true, set: () => tensor.dispose() });
    try {
      expect(tensor.shape).toHaveLength(2);
    } finally {
      Reflect.deleteProperty(prototype, 0);
    }
    expect(tensor.disposed).toBe(true);
  });
});

test('an array that grows while it is read is as long as it was', async () => {
  const device = native().openDevice(cpu);
  const shape: number[] = trappedArray([2, 2], () => shape.push(3, 3, 3, 3, 3));
  expect(device.tensor(null, shape, 'f32').shape).toEqual([2, 2]);
  const model = await makeModel();
  model.setTokenBytes(
    new Uint8Array(40).fill(65),
    Int32Array.from({ length: 41 }, (_, i) => i),
  );
  const strings: Uint8Array[] = trappedArray([Uint8Array.of(66)], () => strings.push(Uint8Array.of(67)));
  expect((await model.sample({ ...request, stopStrings: strings }, token())).tokens).toHaveLength(36);
  model.dispose();
});

describe('a method that is called on what is none of its class', () => {
  const device = native().openDevice(cpu);
  const tensor = device.tensor(null, [1], 'f32');
  const model = native().createModel(config, cpu, true);
  const objects: [string, object][] = [
    ['model', model],
    ['device', device],
    ['tensor', tensor],
    ['cancel token', token() as object],
    ['plain object', {}],
    ['proxy', new Proxy(tensor, {})],
    ['heir of a model', Object.create(model) as object],
    ['prototype', Object.getPrototypeOf(tensor) as object],
    ['function', () => 0],
    ['map', new Map()],
  ];

  const members = [model, device, tensor].flatMap((owner) => {
    const prototype = Object.getPrototypeOf(owner) as object;
    return Object.entries(Object.getOwnPropertyDescriptors(prototype))
      .filter(([name]) => name !== 'constructor')
      .map(([name, { get, value }]) => ({ owner, name, call: (get ?? value) as () => unknown }));
  });

  test('is refused', () => {
    expect(members.length).toBeGreaterThan(30);
    for (const { owner, name, call } of members) {
      for (const [kind, object] of objects) {
        if (object === owner) continue;
        const outcome = (() => {
          try {
            return `${name} on a ${kind} gave ${String(call.call(object))}`;
          } catch (error) {
            return error instanceof MerfError ? error.code : String(error);
          }
        })();
        // V8 itself looks at the receivers of methods, and lets accessors have any.
        expect(['INVALID_ARGUMENT', 'TypeError: Illegal invocation']).toContain(outcome);
      }
      for (const primitive of [undefined, null, 7, 'text', 3n, Symbol('s')]) {
        expect(() => call.call(primitive)).toThrow();
      }
    }
    expect(tensor.disposed).toBe(false);
    expect(() => model.memory()).not.toThrow();
  });

  test('names the class in its error', () => {
    const name = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(device), 'name')?.get;
    expect(() => name?.call(tensor)).toThrow('Expected a device for this but received an object');
    const disposed = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(tensor), 'disposed')?.get;
    expect(() => disposed?.call(device)).toThrow('Expected a tensor for this but received an object');
  });

  test('is refused where another object stands for a tensor', async () => {
    for (const [, object] of objects) {
      if (object === tensor) continue;
      await expect(
        device.groupAdvantages({
          rewards: object as NativeTensor,
          groupOffsets: Int32Array.of(0, 1),
          kind: 'group',
          scale: true,
          epsilon: 0,
        }),
      ).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    }
  });
});

test('a model that is disposed of at any moment of its work ends it in good order', async () => {
  for (let i = 0; i < 12; ++i) {
    const model = await makeModel();
    const cancel = token();
    const calls: Promise<unknown>[] = [
      model.sample({ ...request, maxTokens: Int32Array.of(30, 30) }, cancel, () => {
        if (i % 3 === 0) model.dispose();
      }),
      model.forwardBackward(batch, loss, cancel),
      model.optimStep(optimizer),
      model.readTensor('model.norm.weight', 'value'),
    ];
    if (i % 3 === 1) setTimeout(() => native().cancel(cancel), i % 7);
    setTimeout(() => model.dispose(), i % 5);
    const outcomes = await Promise.allSettled(calls);
    for (const outcome of outcomes) {
      if (outcome.status === 'rejected') expect((outcome.reason as MerfError).code).toBe('ABORTED');
    }
    model.dispose();
  }
}, 120_000);
