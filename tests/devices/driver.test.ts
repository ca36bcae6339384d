import { spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import type { native } from '../../lib/native.js';
import { chooseDevice } from '../../lib/policy/devices.js';
import { lettersTask, merf, root, tinyModel } from '../cli/run.js';
import { expectFailure } from '../policy/helpers.js';

const fakeDriver = join(root, 'build', 'Release', 'fake_driver');
const hasPlugin = existsSync(join(root, 'build', 'Release', 'merf_cuda.so'));

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-driver-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** The command with the driver of tests/native/fake_driver in place of NVIDIA's. */
function withDriver(args: readonly string[], driver: Record<string, string>) {
  expect(existsSync(join(fakeDriver, 'libcuda.so.1'))).toBe(true);
  return merf(args, { env: { LD_LIBRARY_PATH: fakeDriver, ...driver } });
}

const drivers: [string, Record<string, string>, string | RegExp][] = [
  [
    'a driver too old',
    { FAKE_CUDA_VERSION: '11080' },
    /^The NVIDIA driver here is for CUDA 11\.8; this build of merf needs one for CUDA 1[23]\.0 or later \(/,
  ],
  [
    'a driver that fails',
    { FAKE_CUDA_INIT: '802' },
    'The NVIDIA driver does not start: system not yet initialized',
  ],
  ['no GPU', { FAKE_CUDA_GPUS: '0' }, 'The NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)'],
  [
    'no GPU, as the driver itself says it',
    { FAKE_CUDA_INIT: '100' },
    'The NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)',
  ],
  [
    'a GPU too old',
    { FAKE_CUDA_CAPABILITY: '75' },
    'The GPU NVIDIA Fake 80GB has compute capability 7.5; 8.0 or later is needed',
  ],
  [
    'a full GPU',
    { FAKE_CUDA_FREE: '37' },
    'The GPU NVIDIA Fake 80GB is full: 37 MiB are free of its 81920 MiB; end what else is using it',
  ],
  [
    'a GPU too full for a context',
    { FAKE_CUDA_FREE: '-1' },
    'The GPU NVIDIA Fake 80GB is full: 0 bytes are free of its 81920 MiB; end what else is using it',
  ],
];

describe('merf doctor', () => {
  test.each(drivers)('of %s', async (_, driver, message) => {
    const { stdout, code } = await withDriver(['doctor'], driver);
    const said = /^cuda {11}not available: (.*)$/m.exec(stdout)?.[1];
    if (typeof message === 'string') expect(said).toBe(message);
    else expect(said).toMatch(message);
    expect(stdout).toMatch(/^cpu {12}\S/m);
    expect(stdout).toMatch(
      /^cuda-emulated {2}the kernels of cuda on the processor, for merf's tests: very slow$/m,
    );
    expect(stdout).toContain('Everything that training needs is there.');
    expect(code).toBe(0);
  });

  test('of a GPU to use: by a build without its kernels, or as far as this driver goes', async () => {
    const { stdout, code } = await withDriver(['doctor'], {});
    const reason = hasPlugin ? 'The GPU failed at' : 'This build of merf has no merf_cuda.so for device cuda';
    expect(stdout).toContain(`\ncuda           not available: ${reason}`);
    expect(code).toBe(0);
  });
});

describe('the driver that a build needs', () => {
  // The addon in a folder of its own beside a plugin that says what CUDA it was built with.
  const reasonOf = (driver: string, needed: string): string => {
    const addon = join(folder, 'merf.node');
    copyFileSync(join(root, 'build', 'Release', 'merf.node'), addon);
    copyFileSync(join(fakeDriver, 'merf_cuda.so'), join(folder, 'merf_cuda.so'));
    const ask = `process.stdout.write(require(${JSON.stringify(addon)}).describeDevice('cuda').reason)`;
    const { stdout, stderr } = spawnSync(process.execPath, ['-e', ask], {
      encoding: 'utf8',
      env: {
        ...process.env,
        LD_LIBRARY_PATH: fakeDriver,
        FAKE_CUDA_VERSION: driver,
        FAKE_CUDA_NEEDED: needed,
      },
    });
    expect(stderr).toBe('');
    return stdout;
  };

  test('is any of the major version of its CUDA, or a later one', () => {
    expect(reasonOf('12090', '13000')).toBe(
      'The NVIDIA driver here is for CUDA 12.9; this build of merf needs one for CUDA 13.0 or later (580.65 or newer): ' +
        'update the driver',
    );
    expect(reasonOf('11080', '12000')).toBe(
      'The NVIDIA driver here is for CUDA 11.8; this build of merf needs one for CUDA 12.0 or later (525.60 or newer): ' +
        'update the driver',
    );
    for (const [driver, needed] of [
      ['13000', '13000'],
      ['13010', '13000'],
      ['12000', '12000'],
      ['13000', '12000'],
    ] as const) {
      expect(reasonOf(driver, needed)).toBe('The plugin was opened');
    }
  });
});

describe('a device that is not there', () => {
  const train = ['train', '--task', lettersTask, '--model', tinyModel, '--steps', '1'];

  test('is refused with the reason and no stack', async () => {
    const asked = [...train, '--device', 'cuda', '--out', join(folder, 'refused')];
    const { stderr, code } = await withDriver(asked, { FAKE_CUDA_VERSION: '11040' });
    expect(stderr).toMatch(
      /^merf: Device cuda is not available: The NVIDIA driver here is for CUDA 11\.4; .*: update the driver\n$/,
    );
    expect(code).toBe(1);
    expect(existsSync(join(folder, 'refused'))).toBe(false);
  });

  test('is passed over by auto, which says why', async () => {
    const full = { FAKE_CUDA_FREE: '100' };
    const small = ['--prompts-per-step', '1', '--group-size', '2', '--max-tokens', '4'];
    const out = join(folder, 'auto');
    const trained = await withDriver([...train, ...small, '--out', out], full);
    expect(trained.stderr).toBe('');
    expect(trained.stdout).toMatch(
      /^Training .*, on cpu \(The GPU NVIDIA Fake 80GB is full: 100 MiB are free of its 81920 MiB; .*\)$/m,
    );
    expect(trained.code).toBe(0);
    const sampled = await withDriver(
      ['sample', '--model', tinyModel, '--prompt', 'x', '--max-tokens', '2'],
      full,
    );
    expect(sampled.stderr).toMatch(/^merf: on the CPU: The GPU NVIDIA Fake 80GB is full: .*\n$/);
    expect(sampled.code).toBe(0);
  });
});

describe('chooseDevice', () => {
  const device = {
    available: true,
    description: 'NVIDIA H100',
    isa: 'sm_90',
    threads: 1,
    memoryBytes: 80 * 2 ** 30,
    freeBytes: 8 * 2 ** 30,
    fastBf16: true,
    exact: false,
    libraries: [],
  };
  const describeAs = (cuda: object) => (name: string) =>
    ({ ...device, name, ...(name === 'cuda' && cuda) }) as ReturnType<
      ReturnType<typeof native>['describeDevice']
    >;

  test('auto takes the GPU where the model fits its free memory', () => {
    const chosen = chooseDevice('auto', () => 8 * 2 ** 30, describeAs({}));
    expect(chosen.device.name).toBe('cuda');
    expect(chosen.reason).toBeUndefined();
    const full = chooseDevice('auto', () => 9 * 2 ** 30, describeAs({}));
    expect(full.device.name).toBe('cpu');
    expect(full.reason).toBe(
      'The GPU NVIDIA H100 has 8.0 GiB free of its 80.0 GiB, and this model needs at least 9.0 GiB',
    );
    const none = chooseDevice('auto', () => 0, describeAs({ available: false, reason: 'None is here' }));
    expect(none).toMatchObject({ device: { name: 'cpu' }, reason: 'None is here' });
  });

  test('a device by its name is not passed over', async () => {
    expect(chooseDevice('cuda', () => 9 * 2 ** 30, describeAs({})).device.name).toBe('cuda');
    expect(chooseDevice('cpu', () => 0).reason).toBeUndefined();
    await expectFailure(
      () => chooseDevice('cuda', () => 0, describeAs({ available: false, reason: 'None is here' })),
      'DEVICE_UNAVAILABLE',
      'Device cuda is not available: None is here',
    );
    await expectFailure(
      () => chooseDevice('abacus', () => 0),
      'INVALID_ARGUMENT',
      'Expected auto, cpu, cuda, cuda-emulated for device but received "abacus" of type string',
    );
  });
});
