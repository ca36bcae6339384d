import { type Command, InvalidArgumentError, Option } from 'commander';
import type { z } from 'zod';
import { metaOf, type SettingMeta } from '../settings.js';
import { printError } from './output.js';

type AnySchema = z.ZodType & {
  def: { type: string; innerType?: AnySchema; in?: AnySchema; defaultValue?: unknown; entries?: object };
};

/**
 * A flag for every key of `schema`: --learning-rate for learningRate, with its description, its default and the
 * heading that its metadata name. Values come out with the types that the schema wants; what it says of ranges is
 * checked where the settings are.
 */
export function addFlags(command: Command, shape: Record<string, z.ZodType>): void {
  for (const [key, field] of Object.entries(shape)) {
    const meta = metaOf(field);
    const { type, fallback } = unwrap(field as AnySchema);
    const flag = flagName(key);
    const text = meta.description ?? '';
    const shown = defaultText(fallback, text);
    if (type.def.type === 'boolean') {
      // No value of its own until it is given: what is not given must not hide what a config file says.
      const on = new Option(`--${flag}`, `${text}${shown}`);
      const off = new Option(`--no-${flag}`, `turns --${flag} off`)
        .default(undefined)
        .hideHelp(fallback === false);
      command.addOption(group(on, meta.group)).addOption(group(off, meta.group));
      continue;
    }
    const option = new Option(`--${flag} <${valueName(type, meta)}>`, `${text}${shown}`);
    if (type.def.type === 'enum') option.choices(Object.values(type.def.entries as Record<string, string>));
    else if (type.def.type === 'number') option.argParser(number);
    else if (type.def.type === 'array') {
      const element = (type.def as unknown as { element: AnySchema }).element;
      if (meta.verbatim) option.argParser(texts(flag));
      else {
        option.argParser((value: string) =>
          element.def.type === 'number' ? list(value).map(number) : list(value),
        );
      }
    }
    command.addOption(group(option, meta.group));
  }
}

/** The flags of a shape as a list: each with its value's name, and what it means with its default. */
export function describeOptions(
  shape: Record<string, z.ZodType>,
): { key: string; flag: string; description: string }[] {
  return Object.entries(shape).map(([key, field]) => {
    const { type, fallback } = unwrap(field as AnySchema);
    const meta = metaOf(field);
    const text = meta.description ?? '';
    const choices =
      type.def.type === 'enum' ? ` (${Object.values(type.def.entries as object).join(', ')})` : '';
    const value = type.def.type === 'boolean' ? '' : ` <${valueName(type, meta)}>`;
    return {
      key,
      flag: `--${flagName(key)}${value}`,
      description: `${text}${choices}${defaultText(fallback, text)}`,
    };
  });
}

function flagName(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}

/** The default in brackets, where there is one and the description does not say it already. */
function defaultText(fallback: unknown, description: string): string {
  if (fallback === undefined || fallback === false || description.includes('(default')) return '';
  return ` (default: ${show(fallback)})`;
}

function group(option: Option, heading: string | undefined): Option {
  return heading === undefined ? option : option.helpGroup(`${heading}:`);
}

function unwrap(schema: AnySchema): { type: AnySchema; fallback: unknown } {
  let type = schema;
  let fallback: unknown;
  // A transformed value is given on the command line as it is before the transformation.
  for (let inner = type.def.innerType ?? type.def.in; inner; inner = type.def.innerType ?? type.def.in) {
    if (type.def.type === 'default' || type.def.type === 'prefault') fallback = type.def.defaultValue;
    type = inner;
  }
  return { type, fallback };
}

function valueName(type: AnySchema, { verbatim }: Partial<SettingMeta>): string {
  if (type.def.type === 'number') return 'n';
  if (type.def.type === 'array') return verbatim ? 'text' : 'list';
  return 'value';
}

function show(value: unknown): string {
  return Array.isArray(value) ? value.join(',') : String(value);
}

export function number(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || Number.isNaN(value)) throw new InvalidArgumentError('Expected a number.');
  return value;
}

/** A number above 0. */
export function positive(text: string): number {
  const value = number(text);
  if (value <= 0) throw new InvalidArgumentError('Expected a number above 0.');
  return value;
}

/** A whole number of at least `least`. */
export function whole(least: number): (text: string) => number {
  return (text) => {
    const value = number(text);
    if (!Number.isInteger(value) || value < least)
      throw new InvalidArgumentError(`Expected a whole number from ${least}.`);
    return value;
  };
}

/** The parts of a text between commas, or the items of a list in JSON. */
export function list(text: string): string[] {
  const items = text.trimStart().startsWith('[') ? textsOf(text) : undefined;
  return items ?? text.split(',').map((part) => part.trim());
}

/**
 * Reads a flag that is given once for each text: a text as it stands, its commas and newlines included, or in JSON, which
 * can name a newline and several texts.
 */
export function texts(flag: string): (text: string, before: string[] | undefined) => string[] {
  return (text, before = []) => {
    const read = /^\s*["[]/.test(text) ? textsOf(text) : undefined;
    if (read === undefined && text.includes(',')) {
      const shown = JSON.stringify(text);
      printError(
        `merf: --${flag} ${shown} is one string, comma included: give --${flag} once for each string\n`,
      );
    }
    return [...before, ...(read ?? [text])];
  };
}

/** The text or list of texts and numbers that `json` is; undefined where it is no such thing. */
function textsOf(json: string): string[] | undefined {
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch {
    return undefined;
  }
  const items = Array.isArray(value) ? value : [value];
  return items.every((item) => typeof item === 'string' || typeof item === 'number')
    ? items.map(String)
    : undefined;
}
