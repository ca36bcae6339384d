// scripts/gpu-check.sh with a kit, a driver and tools that are shell scripts: what it runs, what it says of a crash, and
// what it leaves behind. The real programs run on the emulated GPU in its rehearsal.
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { root } from '../cli/run.js';

let folder: string;
let kit: string;
let tools: string;

function script(path: string, text: string) {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, `#!/usr/bin/env bash\n${text}`);
  chmodSync(path, 0o755);
}

function check(args: string[], env: Record<string, string> = {}) {
  const { status, stdout, stderr } = spawnSync('bash', [join(root, 'scripts', 'gpu-check.sh'), ...args], {
    cwd: folder,
    encoding: 'utf8',
    env: { ...process.env, PATH: `${tools}:${process.env.PATH}`, CUDACXX: '', ...env },
  });
  return { status, stdout, stderr };
}

const testProgram = `
names=('adds, and subtracts' 'follows a bad address' 'multiplies' 'memory that is not there is refused')
case "$*" in
  *--list-test-cases*)
    echo '[doctest] listing all test case names'
    echo ==========================================
    printf '%s\\n' "\${names[@]}"
    exit 0 ;;
esac
for word in "$@"; do case $word in -tc=*) name=\${word#-tc=} ;; esac; done
ran=1
case $name in
  'adds\\, and subtracts' | 'memory that is not there is refused') code=0 ;;
  'follows a bad address') kill -SEGV $$ ;;
  multiplies)
    code=0
    if [ "\${MERF_CUBLASLT:-}" = none ]; then
      echo 'matmul_test.cc:1: ERROR: CHECK( 0.5 < 0.1 ) is NOT correct!'
      code=1
    fi ;;
  *) ran=0; code=0 ;;
esac
echo "[doctest] test cases: $ran | $ran passed | 0 failed | 3 skipped"
exit $code
`;

const kernels = [
  '"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"',
  ...[0, 1, 2, 3].flatMap((id) => {
    const name = id % 2 === 0 ? 'gather_kernel<merf::bf16>' : 'sample_kernel';
    const launch = `"${id}","7","void merf::cuda::<unnamed>::${name}(const float *, int)","(256, 1, 1)","(8, 1, 1)"`;
    return [
      `${launch},"GPU Speed Of Light Throughput","Duration","us","1,${id}00.5",""`,
      `${launch},"Command line profiler metrics","gpu__time_duration.sum","us","${id + 1}.5",""`,
      `${launch},"Command line profiler metrics","dram__bytes_read.sum","Kbyte","2,000",""`,
      `${launch},"Warp State Statistics","Stall Long Scoreboard","inst","4.2",""`,
      `${launch},"GPU Speed Of Light Throughput","","","","SOLBottleneck"`,
    ];
  }),
].join('\n');

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-gpu-check-'));
  kit = join(folder, 'kit');
  tools = join(folder, 'tools');
  script(join(kit, 'bin', 'merf_native_tests'), testProgram);
  const line = (name: string) =>
    `{"case": "${name}", "engine": "merf", "shape": {"n": 4}, "metrics": {"ms": 1.5}}`;
  script(join(kit, 'bin', 'operators'), `echo '${line('matrix/4')}'\n`);
  script(join(kit, 'bin', 'gpu_step'), 'exit 0\n');
  writeFileSync(join(kit, 'bin', 'merf_cuda.so'), '');
  writeFileSync(
    join(kit, 'kit.json'),
    '{\n "commit": "abc",\n "architectures": "90a-real",\n "nvcc": "13.0.88",\n "node": "v20.1.0"\n}\n',
  );
  const runtime = join(folder, 'runtime');
  mkdirSync(join(runtime, 'build', 'Release'), { recursive: true });
  script(
    join(runtime, 'node'),
    `while [ $# -gt 0 ]; do case $1 in --out) out=$2 ;; --steps) steps=$2 ;; esac; shift; done
mkdir -p "$out"
for ((i = 1; i <= steps; i++)); do echo "{\\"step\\": $i, \\"reward\\": 0.25, \\"loss\\": 0.5}" >>"$out/metrics.jsonl"; done
`,
  );
  spawnSync('tar', ['-C', runtime, '-cJf', join(kit, 'runtime.tar.xz'), '.']);

  script(
    join(tools, 'nvidia-smi'),
    `case "$*" in *compute_cap*) echo 9.0 ;; *) echo 'NVIDIA Test 80GB' ;; esac\n`,
  );
  script(
    join(tools, 'compute-sanitizer'),
    `case "$*" in
  *'bad address'*) echo '========= Invalid __global__ read of size 4 bytes'; echo '========= ERROR SUMMARY: 1 error'; exit 86 ;;
esac
echo '========= ERROR SUMMARY: 0 errors'\n`,
  );
  script(
    join(tools, 'ncu'),
    `while [ $# -gt 0 ]; do case $1 in --log-file) out=$2 ;; esac; shift; done
cat >"$out" <<'END'
==PROF== Connected to process 7
${kernels}
END\n`,
  );
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe('gpu-check.sh', () => {
  test('says what it takes, and refuses what it does not know', () => {
    const help = check(['--help']);
    expect(help.status).toBe(0);
    for (const word of [
      '--call right',
      '200 seconds',
      '--call speed',
      '420 seconds',
      '--kit',
      '--out',
      '--rehearse',
    ])
      expect(help.stdout).toContain(word);
    expect(check(['--fast'])).toMatchObject({ status: 2, stderr: expect.stringContaining('--fast') });
    expect(check(['--call', 'wrong'])).toMatchObject({ status: 2, stderr: expect.stringContaining('wrong') });
    expect(check(['--seconds', '1m'])).toMatchObject({ status: 2, stderr: expect.stringContaining('1m') });
    expect(check(['--out'])).toMatchObject({ status: 2, stderr: expect.stringContaining('--out') });
  });

  test('says that there is no GPU', () => {
    const none = join(folder, 'none');
    script(join(none, 'nvidia-smi'), 'exit 9\n');
    const { status, stderr } = check(['--kit', kit, '--work', join(folder, 'w')], {
      PATH: `${none}:${process.env.PATH}`,
    });
    expect(status).toBe(2);
    expect(stderr).toContain('No NVIDIA GPU was found');
  });

  test('a crash hides no other case, and all results are in a few files', () => {
    const out = join(folder, 'out');
    const options = ['--kit', kit, '--out', out, '--work', join(folder, 'work')];
    const { status, stdout } = check(options);
    expect(status).toBe(1);
    const files = readdirSync(out);
    expect(files.length).toBeLessThanOrEqual(8);
    const name = (call: string, rest: string) => join(out, `nvidia-test-80gb-${call}${rest}`);

    const { parts, cases, train } = JSON.parse(readFileSync(name('right', '.json'), 'utf8'));
    const result = (mode: string, text: string) =>
      cases.find((each: { mode: string; case: string }) => each.mode === mode && each.case === text);
    expect(cases.length).toBe(8);
    for (const mode of ['default', 'none']) {
      expect(result(mode, 'adds, and subtracts')).toMatchObject({ status: 'passed', code: 0 });
      expect(result(mode, 'follows a bad address')).toMatchObject({ status: 'failed', code: 139 });
      expect(result(mode, 'memory that is not there is refused')).toMatchObject({ status: 'passed' });
    }
    expect(result('default', 'multiplies')).toMatchObject({ status: 'passed' });
    expect(result('none', 'multiplies')).toMatchObject({ status: 'failed', code: 1 });
    const outcome = Object.fromEntries(
      parts.map(({ part, status }: { part: string; status: string }) => [part, status]),
    );
    expect(outcome).toEqual({
      'conformance suite on cuda': 'failed',
      memcheck: 'passed',
      racecheck: 'passed',
      'merf train on cuda': 'passed',
      'merf train on cpu': 'passed',
    });
    expect(train.cuda.length).toBe(20);
    const failures = readFileSync(name('right', '-failures.txt'), 'utf8');
    expect(failures).toContain('== none: multiplies\nmatmul_test.cc:1: ERROR');
    expect(failures).toContain('Invalid __global__ read');
    expect(existsSync(name('right', '-logs.tgz'))).toBe(true);

    const kernelTable = readFileSync(name('speed', '.md'), 'utf8');
    expect(kernelTable).toContain('| decoding-9x64 | gather_kernel<bf16> | (8, 1, 1) x (256, 1, 1) | 1000 |');
    expect(kernelTable).toContain('Long Scoreboard 4.2');
    // The step is what follows the first draw up to the second.
    expect(kernelTable).toContain('| all | 2 | 8 |');
    expect(readFileSync(name('speed', '-kernels.csv'), 'utf8')).toMatch(/^group,kernel,grid,block,/);
    expect(stdout).toMatch(/FAILED\n$/);
  }, 60_000);

  test('ends within its budget, and says what it left out', () => {
    const hanging = join(folder, 'hanging');
    spawnSync('cp', ['-r', kit, hanging]);
    script(
      join(hanging, 'bin', 'merf_native_tests'),
      `case "$*" in *--list-test-cases*) printf 'number %d\\n' {1..20} ;; *) sleep 100 ;; esac\n`,
    );
    const out = join(folder, 'short');
    const started = Date.now();
    const options = ['--kit', hanging, '--out', out, '--work', join(folder, 'work')];
    const { status } = check([...options, '--call', 'right', '--seconds', '12']);
    expect(status).toBe(1);
    expect(Date.now() - started).toBeLessThan(30_000);
    const { cases } = JSON.parse(readFileSync(join(out, 'nvidia-test-80gb-right.json'), 'utf8'));
    const counts = cases.map(({ status, code }: { status: string; code: number }) => [status, code]);
    expect(counts).toContainEqual(['failed', 124]);
    expect(counts).toContainEqual(['left out', 0]);
  }, 60_000);
});
