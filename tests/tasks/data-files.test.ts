import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, jest, test } from '@jest/globals';
import { loadRows, placeOf, readRows, requireRows } from '../../lib/tasks/dataset.js';
import { readLines } from '../../lib/tasks/files/jsonl.js';
import { type ParquetLimits, readParquet } from '../../lib/tasks/files/parquet.js';
import { fixturePath, readJson } from '../support/fixtures.js';

// Each Parquet file is read by a process of its own, which a busy machine takes long to start.
jest.setTimeout(180_000);

const cases = join(import.meta.dirname, '../../../shared/cases');
const hasCases = existsSync(cases);

const folder = mkdtempSync(join(tmpdir(), 'merf-data-'));
afterAll(() => rmSync(folder, { recursive: true }));

function write(name: string, content: string | Uint8Array): string {
  const file = join(folder, name);
  writeFileSync(file, content);
  return file;
}

const asTheyAre = (fields: Readonly<Record<string, unknown>>) => fields;

async function fieldsOf(file: string): Promise<unknown[]> {
  return (await readRows(file, asTheyAre)).map((entry) => ('row' in entry ? entry.row : entry.problem));
}

describe('JSONL', () => {
  test('is read in pieces, whose borders fall anywhere', async () => {
    const rows = Array.from({ length: 3000 }, (_, i) => ({ i, text: `${'ö😀'.repeat(i % 97)} ${i}` }));
    const file = write('pieces.jsonl', `${rows.map((row) => JSON.stringify(row)).join('\r\n')}\r\n`);
    expect(await fieldsOf(file)).toEqual(rows);
    const pieces: number[] = [];
    for await (const lines of readLines(file)) pieces.push(lines.length);
    expect(pieces.filter((length) => length > 0).length).toBeGreaterThan(2);
  });

  test('a row longer than a piece', async () => {
    const long = { text: 'long '.repeat(200_000) };
    const file = write('long.jsonl', `${JSON.stringify({ i: 1 })}\n${JSON.stringify(long)}\n{"i":2}`);
    expect(await fieldsOf(file)).toEqual([{ i: 1 }, long, { i: 2 }]);
  });

  test('an extension in upper case, blank lines first and between, a byte order mark', async () => {
    const file = write('UPPER.JSONL', '\uFEFF\n \r\n{"i":1}\n\n{"i":2}');
    const loaded = await readRows(file, asTheyAre);
    expect(loaded.map(({ number, where }) => [number, where])).toEqual([
      [1, `${file}, line 3`],
      [2, `${file}, line 5`],
    ]);
    expect(requireRows(loaded)).toEqual([{ i: 1 }, { i: 2 }]);
  });

  const utf16 = Buffer.from('{"i":1}\n', 'utf16le');
  test.each<[string, Uint8Array]>([
    ['UTF-16', Buffer.concat([Buffer.from([0xff, 0xfe]), utf16])],
    ['UTF-16', Buffer.concat([Buffer.from([0xfe, 0xff]), Buffer.from(utf16).swap16()])],
    ['UTF-16', utf16],
    ['UTF-16', Buffer.from(utf16).swap16()],
    ['UTF-32', Buffer.from('FFFE00007B00000022000000', 'hex')],
    ['UTF-32', Buffer.from('0000FEFF0000007B00000022', 'hex')],
  ])('%s is named', async (encoding, bytes) => {
    const file = write('wide.jsonl', bytes);
    await expect(readRows(file, asTheyAre)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining(`wide.jsonl but it is ${encoding}`),
    });
  });

  test('a line in Latin-1 is a problem of its own and no other text', async () => {
    const file = write('latin.jsonl', Buffer.from('{"a":"é"}\n{"a":"\u00e9"}\n{"a":"e"}', 'latin1'));
    const bytes = Buffer.concat([
      Buffer.from('{"a":"é"}\n'),
      Buffer.from('{"a":"\u00e9"}\n{"a":1}', 'latin1'),
    ]);
    writeFileSync(file, bytes);
    expect(await fieldsOf(file)).toEqual([
      { a: 'é' },
      'Expected a JSON object in UTF-8 but found bytes that are none',
      { a: 1 },
    ]);
  });

  test('integers that a number would round are strings, as in Parquet', async () => {
    const line = '{"id":1152921504606846977,"text":"1152921504606846977 \\" 12345678901234567890",';
    const file = write(
      'long.jsonl',
      `${line}"list":[-9007199254740993,9007199254740991],"real":0.12345678901234567,"power":12345678901234567e3}\n`,
    );
    expect(await fieldsOf(file)).toEqual([
      {
        id: '1152921504606846977',
        text: '1152921504606846977 " 12345678901234567890',
        list: ['-9007199254740993', 9007199254740991],
        real: Number('0.12345678901234567'),
        power: 12345678901234567e3,
      },
    ]);
  });

  test('what nests without end is a problem of its row', async () => {
    const file = write('deep.jsonl', `{"a":${'['.repeat(100_000)}${']'.repeat(100_000)}}\n{"a":[[[1]]]}`);
    expect(await fieldsOf(file)).toEqual([
      'Expected lists and objects at most 256 deep in each other but found deeper ones',
      { a: [[[1]]] },
    ]);
  });

  test('a line without end and the pointer of Git LFS are refused', async () => {
    const endless = write('endless.jsonl', Buffer.alloc(34 << 20, ' '));
    await expect(readRows(endless, asTheyAre)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining('line 1: Expected a line of at most 32 MiB'),
    });
    for (const name of ['pointer.jsonl', 'pointer.parquet']) {
      const pointer = write(name, 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n');
      await expect(readRows(pointer, asTheyAre)).rejects.toMatchObject({
        code: 'MALFORMED_FILE',
        message: expect.stringContaining('Git LFS'),
      });
    }
  });

  test('loadRows stops at the first line that does not fit, and rows know their places', async () => {
    const file = write('places.jsonl', '{"i":1}\n\n{"i":2}\n{"i":\n{"i":4}');
    await expect(loadRows(file, asTheyAre)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining(`${file}, line 4: Expected a JSON object but `),
    });
    writeFileSync(file, '{"i":1}\n\n{"i":2}\n');
    const rows = await loadRows(file, asTheyAre);
    expect(rows.map(placeOf)).toEqual([`${file}, line 1`, `${file}, line 3`]);
    expect([placeOf({ ...rows[0] }), placeOf(3)]).toEqual([undefined, undefined]);
  });
});

describe('Parquet', () => {
  const { rows: right } = readJson<{ rows: unknown[] }>('parquet/rows.json');

  function readable(value: unknown): unknown {
    if (value instanceof Uint8Array) return { bytes: [...value] };
    if (Array.isArray(value)) return value.map(readable);
    if (typeof value !== 'object' || value === null) return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, readable(inner)]));
  }

  test.each(['none', 'snappy', 'gzip', 'brotli', 'zstd', 'lz4'])(
    '%s: the rows are those that pyarrow reads, bytes bytes and nulls null',
    async (codec) => {
      const rows = await fieldsOf(fixturePath(`parquet/${codec}.parquet`));
      expect(rows.map(readable)).toEqual(right);
      // toEqual takes undefined for absent: a null is a null.
      expect(JSON.stringify(rows.map(readable))).toBe(JSON.stringify(right));
    },
  );

  const limited: [string, Partial<ParquetLimits>, string][] = [
    ['time', { seconds: 0.001 }, 'it had not been read after 0 s'],
    ['rows', { rows: 23 }, 'it says that it has 24 rows, and a file of its size has 23 at most'],
    ['values', { mebibytes: 64, valueMebibytes: 0.0001 }, 'its values are larger than'],
    ['memory', { mebibytes: 2 }, 'the process that reads it, which may take 2 MiB of memory, ended with SIG'],
  ];
  test.each(limited)('%s over the limit is an error, and the process goes on', async (_, limits, reason) => {
    const read = async () => {
      for await (const _rows of readParquet(fixturePath('parquet/zstd.parquet'), limits));
    };
    await expect(read()).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining(`zstd.parquet cannot be read as Parquet: ${reason}`),
    });
  });

  (hasCases ? test : test.skip)('null lists, structs and bytes [needs ../shared]', async () => {
    expect(await fieldsOf(join(cases, 'nested.parquet'))).toEqual([
      {
        id: 1,
        extra: { a: 1 },
        messages: [{ role: 'user', content: 'x' }],
        tags: ['a', null],
        ts: `${2n ** 60n}`,
      },
      { id: 2, extra: null, messages: null, tags: null, ts: null },
      { id: 3, extra: { a: null }, messages: [], tags: [], ts: 5 },
    ]);
  });

  (hasCases ? test : test.skip)(
    'a file that hangs a decoder is refused beside the event loop [needs ../shared]',
    async () => {
      const file = join(cases, 'parquet-hang-snappy.parquet');
      let turns = 0;
      const timer = setInterval(() => turns++, 5);
      await expect(readRows(file, asTheyAre)).rejects.toMatchObject({ code: 'MALFORMED_FILE' });
      clearInterval(timer);
      expect(turns).toBeGreaterThan(2);
    },
  );

  test('a column that lacks values of its rows is none of nulls', async () => {
    const bytes = Buffer.from(
      'UEFSMRUAFRQVFCwVAhUAFQYVBhwAAAACAAAAAgEHAAAAFQQZLDUAGAZzY2hlbWEVAgAVAiUCGAF4ABYCGRwZHCYAHB' +
        'UCGSUGABkYAXgVABYCFjoWOiYISRwVABUAFQIAPCkGGSYAAgAAABY6FgImCBY6ACggcGFycXVldC1jcHAtYXJyb3cg' +
        'dmVyc2lvbiAyNi4wLjEZHBwAAAB6AAAAUEFSMQ==',
      'base64',
    );
    expect(await fieldsOf(write('whole.parquet', bytes))).toEqual([{ x: 7 }]);
    // The count of the only row group's rows, 1 as a zigzag integer, becomes 9.
    bytes[bytes.indexOf('163a1602', 0, 'hex') + 3] = 18;
    await expect(readRows(write('short.parquet', bytes), asTheyAre)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining('values in 9 rows'),
    });
  });
});
