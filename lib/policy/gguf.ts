import { setImmediate } from 'node:timers/promises';
import { fileSize, lfsPointer, malformed, readRange, unsupported } from './files.js';
import type { StoredTensor } from './safetensors.js';

export type GgufValue = number | bigint | boolean | string | GgufValue[];

export interface GgufFile {
  path: string;
  /** Values that no reader of models asks for are left out where they are large: see `isWanted`. */
  metadata: Map<string, GgufValue>;
  /** `dtype` is ggml's name of the type (F32, Q4_1, ...); `shape` has the slowest dimension first, as in PyTorch. */
  tensors: Map<string, StoredTensor>;
}

/** ggml's tensor types by number: elements and bytes of a block. */
const ggmlTypes: Readonly<Record<number, readonly [name: string, elements: number, bytes: number]>> = {
  0: ['F32', 1, 4],
  1: ['F16', 1, 2],
  2: ['Q4_0', 32, 18],
  3: ['Q4_1', 32, 20],
  6: ['Q5_0', 32, 22],
  7: ['Q5_1', 32, 24],
  8: ['Q8_0', 32, 34],
  9: ['Q8_1', 32, 36],
  10: ['Q2_K', 256, 84],
  11: ['Q3_K', 256, 110],
  12: ['Q4_K', 256, 144],
  13: ['Q5_K', 256, 176],
  14: ['Q6_K', 256, 210],
  15: ['Q8_K', 256, 292],
  16: ['IQ2_XXS', 256, 66],
  17: ['IQ2_XS', 256, 74],
  18: ['IQ3_XXS', 256, 98],
  19: ['IQ1_S', 256, 50],
  20: ['IQ4_NL', 32, 18],
  21: ['IQ3_S', 256, 110],
  22: ['IQ2_S', 256, 82],
  23: ['IQ4_XS', 256, 136],
  24: ['I8', 1, 1],
  25: ['I16', 1, 2],
  26: ['I32', 1, 4],
  27: ['I64', 1, 8],
  28: ['F64', 1, 8],
  29: ['IQ1_M', 256, 56],
  30: ['BF16', 1, 2],
  34: ['TQ1_0', 256, 54],
  35: ['TQ2_0', 256, 66],
  39: ['MXFP4', 32, 17],
};

/** Bytes of a metadata value by its type number; strings (8) and arrays (9) are at least this long. */
const valueBytes = [1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8] as const;
const stringType = 8;
const arrayType = 9;

const limits = {
  keyBytes: 65_535,
  tensors: 1_000_000,
  metadataKeys: 1_000_000,
  dimensions: 4,
  arrayDepth: 4,
  /** Bytes that names and values may take. Those of the largest vocabularies and their merges take 20 MB. */
  keptBytes: 1 << 28,
  /** What a string that is skipped and an array within an array count as, so that their number is bounded too. */
  skippedBytes: 128,
  nestedBytes: 4096,
  /** Elements of an array, and bytes of a string, from which on those that no reader asks for are skipped. */
  smallArray: 4096,
  smallString: 1 << 16,
};

/** Bytes read at a time. */
const windowBytes = 4 << 20;

/** Elements of an array, and entries of the directory, that are parsed before the event loop has its turn. */
const elementsATurn = 16_384;

/** Whether a large value of this key is kept: a tokenizer's lists and templates are. */
const isWanted = (key: string) => /^tokenizer\.(ggml\.|chat_template)/.test(key);

/** Thrown inside the reader where the window ends before what is read does. */
class NeedMore extends Error {
  constructor(readonly bytes: number) {
    super();
  }
}

/**
 * The metadata and tensor directory of a .gguf file (version 2 or 3, little-endian). Every count, length, offset and
 * shape is checked against the file's size before anything of that size is made, memory is bounded whatever
 * the file says, and the event loop goes on. Format:
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, UNSUPPORTED
 */
export async function readGguf(path: string): Promise<GgufFile> {
  const size = await fileSize(path);
  const reader = new HeaderReader(path, size);
  const magic = await reader.read(() => reader.take(4, 'the magic number'));
  if (String.fromCharCode(...magic) !== 'GGUF') {
    const pointer = await lfsPointer(path);
    if (pointer !== undefined) throw pointer;
    throw malformed(path, `expected the magic number GGUF but found bytes ${[...magic].join(' ')}`);
  }
  const version = await reader.read(() => reader.u32('the version'));
  if (version === 1 || version > 3) {
    const swapped = version > 0xffff ? ' (a big-endian file?)' : '';
    throw unsupported(path, `expected GGUF version 2 or 3 but found ${version}${swapped}`);
  }
  if (version === 0) throw malformed(path, 'expected GGUF version 2 or 3 but found 0');
  const [tensorCount, keyCount] = await reader.read(() => [
    reader.count('the number of tensors', limits.tensors, 24),
    reader.count('the number of metadata keys', limits.metadataKeys, 13),
  ]);

  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < keyCount; ++i) {
    const key = await reader.read(() => reader.string(`metadata key ${i}`, limits.keyBytes));
    if (metadata.has(key)) throw malformed(path, `metadata key ${key} occurs twice`);
    const value = await reader.value(`metadata ${key}`, isWanted(key));
    if (value !== undefined) metadata.set(key, value);
  }
  const alignment = metadata.get('general.alignment') ?? 32;
  if (typeof alignment !== 'number' || alignment < 8 || alignment > 1 << 20 || alignment % 8 !== 0) {
    throw malformed(
      path,
      `expected a multiple of 8 up to ${1 << 20} for general.alignment but found ${String(alignment)}`,
    );
  }

  const directory: { name: string; type: number; dimensions: number[]; offset: number }[] = [];
  for (let i = 0; i < tensorCount; ++i) {
    const entry = await reader.read(() => {
      const name = reader.string(`the name of tensor ${i}`, limits.keyBytes);
      const rank = reader.u32(`the number of dimensions of tensor ${name}`);
      if (rank < 1 || rank > limits.dimensions) {
        throw malformed(
          path,
          `tensor ${name}: expected 1 to ${limits.dimensions} dimensions but found ${rank}`,
        );
      }
      const dimensions: number[] = [];
      for (let d = 0; d < rank; ++d) dimensions.push(reader.u64(`dimension ${d} of tensor ${name}`));
      const type = reader.u32(`the type of tensor ${name}`);
      return { name, type, dimensions, offset: reader.u64(`the offset of tensor ${name}`) };
    });
    directory.push(entry);
    if (i % elementsATurn === elementsATurn - 1) await setImmediate();
  }

  const dataStart = Math.ceil(reader.position / alignment) * alignment;
  const tensors = new Map<string, StoredTensor>();
  for (const { name, type, dimensions, offset } of directory) {
    const known = ggmlTypes[type];
    if (known === undefined)
      throw unsupported(path, `tensor ${name} has ggml type ${type}, which is not known`);
    if (tensors.has(name)) throw malformed(path, `tensor ${name} occurs twice`);
    const [dtype, blockElements, blockBytes] = known;
    const rowElements = dimensions[0] as number;
    if (rowElements % blockElements !== 0) {
      throw malformed(
        path,
        `tensor ${name}: expected rows of a multiple of ${blockElements} for ${dtype} but found ${rowElements}`,
      );
    }
    const elements = dimensions.reduce((product, n) => product * n, 1);
    const byteLength = (elements / blockElements) * blockBytes;
    if (elements === 0 || !Number.isSafeInteger(elements) || !Number.isSafeInteger(byteLength)) {
      throw malformed(path, `tensor ${name}: shape [${dimensions}] has an impossible number of elements`);
    }
    if (offset % alignment !== 0) {
      throw malformed(
        path,
        `tensor ${name}: expected an offset that is a multiple of ${alignment} but found ${offset}`,
      );
    }
    if (dataStart + offset + byteLength > size) {
      throw malformed(
        path,
        `tensor ${name} (${dtype} [${dimensions}]) takes bytes ${dataStart + offset} to ${dataStart + offset + byteLength} but the file has ${size} (truncated?)`,
      );
    }
    tensors.set(name, { dtype, shape: dimensions.reverse(), offset: dataStart + offset, byteLength });
  }
  let end = 0;
  for (const [name, tensor] of [...tensors].sort((a, b) => a[1].offset - b[1].offset)) {
    if (tensor.offset < end) throw malformed(path, `tensor ${name} overlaps the tensor before it`);
    end = tensor.offset + tensor.byteLength;
  }
  return { path, metadata, tensors };
}

const utf8 = new TextDecoder('utf-8');

/** Reads a header through a window of its bytes, which moves on as they are taken. */
class HeaderReader {
  position = 0;
  #bytes: Uint8Array = new Uint8Array();
  #view = new DataView(this.#bytes.buffer);
  /** Where the window begins in the file. */
  #start = 0;
  #kept = 0;

  constructor(
    readonly path: string,
    readonly size: number,
  ) {}

  /**
   * What `parse` returns, which is run again from where it began with more bytes in the window where it needs
   * them.
   */
  async read<T>(parse: () => T): Promise<T> {
    for (;;) {
      const [position, kept] = [this.position, this.#kept];
      try {
        return parse();
      } catch (error) {
        if (!(error instanceof NeedMore)) throw error;
        [this.position, this.#kept] = [position, kept];
        const wanted = Math.max(windowBytes, 2 * (error.bytes - position));
        this.#start = position;
        this.#bytes = await readRange(this.path, position, Math.min(wanted, this.size - position));
        this.#view = new DataView(this.#bytes.buffer);
      }
    }
  }

  /** Moves on by `length` bytes; returns where in the file they begin. */
  #pass(length: number, what: string): number {
    const start = this.position;
    if (length > this.size - start) {
      throw malformed(
        this.path,
        `${what} at byte ${start} takes ${length} bytes but the file has only ${this.size - start} more (truncated?)`,
      );
    }
    this.position += length;
    return start;
  }

  /** Moves on by `length` bytes that are in the window; returns where in the window they begin. */
  #advance(length: number, what: string): number {
    const start = this.#pass(length, what) - this.#start;
    if (start + length > this.#bytes.length) throw new NeedMore(this.position);
    return start;
  }

  #keep(bytes: number, what: string): void {
    this.#kept += bytes;
    if (this.#kept > limits.keptBytes) {
      throw malformed(this.path, `up to ${what} the header has more than ${limits.keptBytes} bytes to keep`);
    }
  }

  take(length: number, what: string): Uint8Array {
    const start = this.#advance(length, what);
    return this.#bytes.subarray(start, start + length);
  }

  u32(what: string): number {
    return this.#view.getUint32(this.#advance(4, what), true);
  }

  u64(what: string): number {
    const at = this.#advance(8, what);
    const value = this.#view.getUint32(at + 4, true) * 2 ** 32 + this.#view.getUint32(at, true);
    if (value > Number.MAX_SAFE_INTEGER) {
      const exact = this.#view.getBigUint64(at, true);
      throw malformed(this.path, `${what} at byte ${this.position - 8} is ${exact}, larger than any file`);
    }
    return value;
  }

  /** A count of things that take at least `bytesEach`, so that a lying count is refused before it is believed. */
  count(what: string, maximum: number, bytesEach: number): number {
    const value = this.u64(what);
    const room = Math.floor((this.size - this.position) / bytesEach);
    if (value > maximum || value > room) {
      throw malformed(
        this.path,
        `${what} is ${value} but at most ${Math.min(maximum, room)} fit in the file`,
      );
    }
    return value;
  }

  string(what: string, maximum = limits.keptBytes): string {
    const length = this.u64(`the length of ${what}`);
    if (length > maximum) throw malformed(this.path, `${what} is ${length} bytes long, more than ${maximum}`);
    this.#keep(16 + length, what);
    return utf8.decode(this.take(length, what));
  }

  /** A value of any type; undefined where it is large and not `wanted`, and skipped. */
  async value(what: string, wanted: boolean): Promise<GgufValue | undefined> {
    const type = await this.read(() => this.u32(`the type of ${what}`));
    if (type === arrayType) return this.#array(what, wanted, 0);
    if (type !== stringType || wanted) return this.read(() => this.#scalar(type, what));
    const length = await this.read(() => this.u64(`the length of ${what}`));
    if (length > limits.smallString) {
      this.#pass(length, what);
      return undefined;
    }
    this.#keep(length, what);
    return this.read(() => utf8.decode(this.take(length, what)));
  }

  async #array(what: string, wanted: boolean, depth: number): Promise<GgufValue[] | undefined> {
    if (depth === limits.arrayDepth)
      throw malformed(this.path, `${what} nests arrays more than ${limits.arrayDepth} deep`);
    const elementType = await this.read(() => this.u32(`the element type of ${what}`));
    const bytesEach = valueBytes[elementType];
    if (bytesEach === undefined)
      throw malformed(this.path, `${what}: expected an element type from 0 to 12 but found ${elementType}`);
    const length = await this.read(() =>
      this.count(`the length of ${what}`, Number.MAX_SAFE_INTEGER, bytesEach),
    );
    const keeps = wanted || length <= limits.smallArray;
    const flat = elementType !== stringType && elementType !== arrayType;
    if (flat && !keeps) {
      this.#pass(length * bytesEach, what);
      return undefined;
    }
    const values: GgufValue[] = [];
    for (let first = 0; first < length; first += elementsATurn) {
      const last = Math.min(length, first + elementsATurn);
      if (first > 0) await setImmediate();
      if (elementType === arrayType) {
        for (let i = first; i < last; ++i) {
          this.#keep(limits.nestedBytes, what);
          const inner = await this.#array(what, wanted, depth + 1);
          if (keeps && inner !== undefined) values.push(inner);
        }
        continue;
      }
      for (let i = first; i < last; )
        i = await this.read(() => this.#elements(elementType, what, i, last, keeps ? values : undefined));
    }
    return keeps ? values : undefined;
  }

  /**
   * Adds elements from `first` on to `values`, or skips them, as far as the window goes; returns how far that
   * is.
   */
  #elements(type: number, what: string, first: number, end: number, values: GgufValue[] | undefined): number {
    for (let i = first; i < end; ++i) {
      const [position, kept] = [this.position, this.#kept];
      try {
        if (values !== undefined) {
          values.push(this.#scalar(type, what));
        } else {
          this.#keep(limits.skippedBytes, what);
          this.#pass(this.u64(`the length of ${what}`), what);
        }
      } catch (error) {
        if (!(error instanceof NeedMore) || i === first) throw error;
        [this.position, this.#kept] = [position, kept];
        return i;
      }
    }
    return end;
  }

  #scalar(type: number, what: string): GgufValue {
    if (type === stringType) return this.string(what);
    const length = valueBytes[type];
    if (length === undefined)
      throw malformed(this.path, `${what}: expected a value type from 0 to 12 but found ${type}`);
    this.#keep(8, what);
    const at = this.#advance(length, what);
    switch (type) {
      case 0:
        return this.#view.getUint8(at);
      case 1:
        return this.#view.getInt8(at);
      case 2:
        return this.#view.getUint16(at, true);
      case 3:
        return this.#view.getInt16(at, true);
      case 4:
        return this.#view.getUint32(at, true);
      case 5:
        return this.#view.getInt32(at, true);
      case 6:
        return this.#view.getFloat32(at, true);
      case 7: {
        const flag = this.#view.getUint8(at);
        if (flag > 1) throw malformed(this.path, `${what}: expected a boolean of 0 or 1 but found ${flag}`);
        return flag === 1;
      }
      case 10:
        return narrowed(this.#view.getBigUint64(at, true));
      case 11:
        return narrowed(this.#view.getBigInt64(at, true));
      default:
        return this.#view.getFloat64(at, true);
    }
  }
}

function narrowed(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}
