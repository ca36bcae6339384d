import type { Draw } from './draw.js';

const maxTextLength = 1 << 20;

const extremes = [
  0n,
  1n,
  127n,
  128n,
  255n,
  256n,
  32_767n,
  65_535n,
  65_536n,
  (1n << 24n) - 1n,
  (1n << 31n) - 1n,
  1n << 31n,
  (1n << 32n) - 1n,
  1n << 32n,
  (1n << 53n) - 1n,
  1n << 53n,
  (1n << 63n) - 1n,
  1n << 63n,
  (1n << 64n) - 1n,
];

/** An integer of `bytes` bytes at the edge of what fits, or of what is believed. */
export function extreme(draw: Draw, bytes: 1 | 2 | 4 | 8): bigint {
  const value = draw.chance(0.3) ? BigInt(draw.below(1 << 16)) : draw.pick(extremes);
  return BigInt.asUintN(8 * bytes, draw.chance(0.2) ? -value : value);
}

export function writeInteger(target: Uint8Array, offset: number, bytes: 1 | 2 | 4 | 8, value: bigint): void {
  for (let i = 0; i < bytes && offset + i < target.length; ++i) {
    target[offset + i] = Number((value >> BigInt(8 * i)) & 0xffn);
  }
}

/** Changes some bytes in the part of `bytes` from `from` up to `to`, or takes some away or adds some. */
export function mutateBytes(draw: Draw, bytes: Uint8Array, from = 0, to = bytes.length): Uint8Array {
  let result: Uint8Array = Uint8Array.from(bytes);
  const rounds = 1 + (draw.chance(0.3) ? draw.below(8) : 0);
  for (let round = 0; round < rounds; ++round) {
    const end = Math.min(to, result.length);
    const at = from + draw.below(Math.max(1, end - from));
    const length = Math.min(result.length - at, 1 + draw.below(draw.chance(0.2) ? 4096 : 16));
    switch (draw.below(6)) {
      case 0:
        if (at < result.length) result[at] = (result[at] as number) ^ (1 << draw.below(8));
        break;
      case 1: {
        const width = draw.pick([1, 2, 4, 8] as const);
        writeInteger(result, at, width, extreme(draw, width));
        break;
      }
      case 2:
        if (at < result.length) result[at] = draw.below(256);
        break;
      case 3:
        result = joined(result.subarray(0, at), result.subarray(at + length));
        break;
      case 4:
        result = joined(result.subarray(0, at), result.subarray(at, at + length), result.subarray(at));
        break;
      default:
        if (draw.chance(0.3)) result = result.slice(0, at);
    }
  }
  return result;
}

export function joined(...parts: readonly Uint8Array[]): Uint8Array {
  return new Uint8Array(Buffer.concat(parts));
}

/** Names that mean something to JavaScript's objects. */
export const hostileNames = [
  '__proto__',
  'constructor',
  'prototype',
  'toString',
  'valueOf',
  'hasOwnProperty',
  'then',
  'length',
  '',
];

const hostileTexts = [
  ...hostileNames,
  '\0',
  '\u001b]52;c;QQ==\u0007',
  '\ud800',
  '\udc00',
  '\ufeff',
  '\r\n',
  '\u2028',
  'é',
  'İ',
  'ß',
  '中',
  '𝔸',
  '👩‍👩‍👧',
  '\ufdd0',
  '<think>',
  '</think>',
  '<answer>',
  '</answer>',
  '<|im_end|>',
  '{{',
  '{%',
  '%}',
  '\\boxed{',
  '(a+)+$',
  '(',
  '[',
  '{',
  '"',
  '\\',
  '-',
  '0',
  '1e999',
  '99999999999999999999',
  'NaN',
  'null',
];

export function hostileText(draw: Draw): string {
  const text = draw.pick(hostileTexts);
  return draw.chance(0.15) ? text.repeat(draw.pick([64, 1000, 20_000])) : text;
}

export function mutateText(draw: Draw, text: string): string {
  let result = text;
  const rounds = 1 + draw.below(4);
  for (let round = 0; round < rounds && result.length < maxTextLength; ++round) {
    const at = draw.below(result.length + 1);
    const end = Math.min(result.length, at + 1 + draw.below(draw.chance(0.3) ? 400 : 12));
    const [before, part, after] = [result.slice(0, at), result.slice(at, end), result.slice(end)];
    switch (draw.below(6)) {
      case 0:
        result = before + hostileText(draw) + part + after;
        break;
      case 1:
        result = before + after;
        break;
      case 2:
        result = before + part.repeat(draw.pick([2, 3, 100, 5000])).slice(0, maxTextLength) + after;
        break;
      case 3:
        result = before + hostileText(draw) + after;
        break;
      case 4:
        result = before + after + part;
        break;
      default:
        result = before + String.fromCharCode(draw.below(draw.chance(0.5) ? 128 : 65_536)) + after;
    }
  }
  return result;
}

// What JSON.stringify cannot write is put in for these afterwards.
const deep = '\u0001deep';
const infinite = '\u0001infinite';

function hostileValue(draw: Draw): unknown {
  const kind = draw.below(16);
  switch (kind) {
    case 0:
      return null;
    case 1:
      return draw.chance(0.5);
    case 2:
      return {};
    case 3:
      return [];
    case 4:
      return deep;
    case 5:
      return infinite;
    case 6:
      return [null];
    case 7:
      return Array.from({ length: draw.pick([2, 65, 5000]) }, (_, i) => i);
    case 8:
      return own({}, draw.pick(hostileNames), draw.chance(0.5) ? null : { id: 1, type: 'x' });
    case 9:
    case 10:
    case 11:
      return hostileText(draw);
    default:
      return draw.pick([
        0,
        -0,
        1,
        -1,
        2,
        0.5,
        1e-300,
        1e300,
        2 ** 31 - 1,
        2 ** 31,
        2 ** 32,
        2 ** 53 - 1,
        2 ** 53,
        16_777_216,
      ]);
  }
}

function own(target: Record<string, unknown>, key: string, value: unknown): Record<string, unknown> {
  Object.defineProperty(target, key, { value, enumerable: true, writable: true, configurable: true });
  return target;
}

type Container = Record<string, unknown> | unknown[];

/** A place in a value, reached from its root by keys that are drawn; near ones are likelier. */
function placeIn(draw: Draw, root: Container): { container: Container; key: string } | undefined {
  let container = root;
  for (;;) {
    const keys = Object.keys(container);
    if (keys.length === 0) return undefined;
    const key = draw.pick(keys);
    const inner = (container as Record<string, unknown>)[key];
    if (typeof inner !== 'object' || inner === null || Object.keys(inner).length === 0 || draw.chance(0.25)) {
      return { container, key };
    }
    container = inner as Container;
  }
}

function put(container: Container, key: string, value: unknown): void {
  if (Array.isArray(container)) container[Number(key)] = value;
  else own(container, key, value);
}

/** A copy of a JSON value in which some parts are others, elsewhere, missing or there twice. */
export function mutateJson<T extends object>(draw: Draw, value: T): T {
  const root = JSON.parse(JSON.stringify(value)) as Container;
  const rounds = 1 + (draw.chance(0.4) ? draw.below(4) : 0);
  for (let round = 0; round < rounds; ++round) {
    const place = placeIn(draw, root);
    if (place === undefined) break;
    const { container, key } = place;
    const current = (container as Record<string, unknown>)[key];
    switch (draw.below(8)) {
      case 0:
        if (Array.isArray(container)) container.splice(Number(key), 1);
        else delete container[key];
        break;
      case 1: {
        if (Array.isArray(container)) container.push(current);
        else own(container, draw.chance(0.5) ? hostileText(draw) : draw.pick(hostileNames), current);
        break;
      }
      case 2: {
        const other = placeIn(draw, root);
        if (other) put(container, key, copied((other.container as Record<string, unknown>)[other.key]));
        break;
      }
      case 3:
        put(container, key, draw.chance(0.5) ? [current] : { [draw.pick(['type', 'id', 'a'])]: current });
        break;
      case 4:
        if (typeof current === 'string') put(container, key, mutateText(draw, current));
        else if (typeof current === 'number')
          put(container, key, draw.pick([-current, current + 1, current * 2 ** 31, current + 0.5]));
        else put(container, key, hostileValue(draw));
        break;
      default:
        put(container, key, hostileValue(draw));
    }
  }
  return root as T;
}

function copied(value: unknown): unknown {
  return value === undefined ? null : (JSON.parse(JSON.stringify(value)) as unknown);
}

/** A mutated JSON value as text, which is sometimes mutated again, so that it need not be JSON. */
export function mutatedJsonText(draw: Draw, value: object): string {
  const depth = draw.pick([65, 300, 5000, 100_000]);
  const text = JSON.stringify(mutateJson(draw, value))
    .replaceAll(JSON.stringify(deep), () => '['.repeat(depth) + ']'.repeat(depth))
    .replaceAll(JSON.stringify(infinite), '1e999');
  return draw.chance(0.15) ? mutateText(draw, text) : text;
}
