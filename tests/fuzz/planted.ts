import type { Target } from './target.js';

const make = () => ({ text: 'planted' });

/** Targets that are right, and wrong in every way that the fuzzer has to notice. */
export const targets: readonly Target[] = [
  { name: 'right', make, run: () => 1 },
  {
    name: 'throws',
    make,
    run() {
      throw new TypeError('planted');
    },
  },
  {
    name: 'hangs',
    seconds: 0.2,
    make,
    run() {
      for (;;);
    },
  },
  {
    name: 'forgets',
    make,
    async run() {
      void Promise.reject(new RangeError('planted'));
      await new Promise((resolve) => setImmediate(resolve));
    },
  },
  {
    name: 'exits',
    make,
    run() {
      process.exit(3);
    },
  },
];
