import * as jinja from '@huggingface/jinja';
import { strftime } from './strftime.js';

/** A parsed template. */
export interface Program {
  readonly body: readonly unknown[];
}

interface Environment {
  readonly variables: Map<string, unknown>;
  set(name: string, value: unknown): unknown;
}

interface RuntimeValue {
  readonly type: string;
  readonly value: unknown;
}

/** A part of a program; a filter that is called has `callee` and `args`. */
interface Node {
  readonly type: string;
  readonly filter?: Node;
  readonly callee?: Node;
  readonly args?: readonly Node[];
  readonly value?: unknown;
}

interface Interpreter {
  run(program: Program): RuntimeValue;
  evaluate(statement: Node | undefined, environment: Environment): RuntimeValue;
}

// The library's declarations name these without a file extension, which Node's resolution does not follow.
const { Environment, Interpreter, parse, tokenize } = jinja as unknown as {
  Environment: new () => Environment;
  Interpreter: new (environment: Environment) => Interpreter;
  parse(tokens: unknown): Program;
  tokenize(source: string, options: { lstrip_blocks: boolean; trim_blocks: boolean }): unknown;
};

/** A template that would compute more than a chat needs. */
export class TemplateLimitExceeded extends Error {}

// A template is a file from outside, whose loops and texts could otherwise take all time and memory there is.
// A real one has some 30,000 characters and takes some 1,000 operations a message.
const maxSourceLength = 1 << 20;
/** A longer run of white space would make the lexer's search for `generation` blocks quadratic. */
const maxWhiteSpaceRun = 4096;
/** The bound of Jinja's own sandbox. */
const maxRange = 100_000;
const maxItems = 1 << 17;
const maxIndent = 1024;
const baseWeight = 1 << 20;
const baseWork = 1 << 21;
const workOfOperation = 16;
const workOfThrow = 256;
const workOfCharacter = 256;
/** What a value of the variables counts beside its text. */
const sizeOfValue = 64;

/**
 * Parses a template with the block settings that `transformers` uses. All line ends become `\n` first, as
 * Jinja's lexer makes them.
 * @throws Error where the text is not Jinja
 */
export function compileTemplate(source: string): Program {
  if (source.length > maxSourceLength) {
    throw new TemplateLimitExceeded(`it is longer than ${maxSourceLength} characters`);
  }
  if (new RegExp(`\\s{${maxWhiteSpaceRun}}`).test(source)) {
    throw new TemplateLimitExceeded(`it has ${maxWhiteSpaceRun} characters of white space in a row`);
  }
  // The library would take the tags of a `generation` block out, and white space at both sides would become
  // one.
  const text = source
    .replace(/\r\n?/g, '\n')
    .replace(/\{%(-?)\s*generation\s*(-?)%\}/g, '{%$1 if true $2%}')
    .replace(/\{%(-?)\s*endgeneration\s*(-?)%\}/g, '{%$1 endif $2%}');
  return parse(tokenize(text, { lstrip_blocks: true, trim_blocks: true }));
}

/**
 * @throws Error where the template fails, TemplateLimitExceeded where it goes on for too long or writes too
 *   much
 */
export function renderTemplate(program: Program, variables: Readonly<Record<string, unknown>>): string {
  const given = Object.entries(variables);
  const environment = new Environment();
  for (const [name, value] of [...Object.entries(globals), ...given]) {
    environment.variables.delete(name);
    environment.set(name, value);
  }
  const size = given.reduce((sum, [, value]) => sum + sizeOf(value), 0);
  return String(new LimitedInterpreter(environment, size).run(program).value);
}

const globals: Readonly<Record<string, unknown>> = {
  false: false,
  true: true,
  none: null,
  False: false,
  True: true,
  None: null,
  raise_exception: (message: unknown) => {
    throw new Error(String(message));
  },
  range,
  strftime_now: (format: unknown) => {
    if (typeof format !== 'string') throw new Error('strftime_now expects a format of text');
    return strftime(new Date(), format);
  },
};

/** Python's `range`, of at most as many numbers as Jinja's sandbox allows. */
function range(...bounds: unknown[]): number[] {
  if (bounds.length < 1 || bounds.length > 3 || !bounds.every(Number.isSafeInteger)) {
    throw new Error('range expects 1 to 3 whole numbers');
  }
  const [first, second, step = 1] = bounds as [number, number?, number?];
  const [start, stop] = second === undefined ? [0, first] : [first, second];
  if (step === 0) throw new Error('range expects a step other than 0');
  const count = Math.max(0, Math.ceil((stop - start) / step));
  if (count > maxRange) {
    throw new TemplateLimitExceeded(`it asks for a range of ${count} numbers, and ${maxRange} are allowed`);
  }
  return Array.from({ length: count }, (_, i) => start + i * step);
}

/** Counts every evaluation and what it makes, and ends a template that makes too much. */
class LimitedInterpreter extends Interpreter {
  #work: number;
  readonly #maxWeight: number;
  readonly #weights = new WeakMap<object, number>();

  /** @param given size of the variables, which what a template may make of them grows with */
  constructor(environment: Environment, given: number) {
    super(environment);
    this.#maxWeight = baseWeight + 64 * given;
    this.#work = baseWork + workOfCharacter * given;
  }

  override evaluate(statement: Node | undefined, environment: Environment): RuntimeValue {
    // Counted beforehand, since `continue` and `break`, which are thrown, never come back.
    this.#count(
      statement?.type === 'Continue' || statement?.type === 'Break' ? workOfThrow : workOfOperation,
    );
    if (statement?.type.startsWith('Filter')) this.#checkIndent(statement.filter, environment);
    const result = super.evaluate(statement, environment);
    const { value } = result;
    if (typeof value === 'string') this.#count(value.length);
    else if (Array.isArray(value)) this.#count(workOfOperation * value.length);
    if (typeof value === 'string' || typeof value === 'object') this.#weight(result);
    return result;
  }

  #count(work: number): void {
    this.#work -= work;
    if (this.#work < 0) throw new TemplateLimitExceeded('it takes more operations than a chat needs');
  }

  /**
   * How long a value is as text, roughly. What a list holds twice counts twice, since it is written twice.
   * A namespace alone can change, so that its weight is not kept.
   */
  #weight({ type, value }: RuntimeValue): number {
    if (typeof value === 'string') return this.#allowed(value.length);
    if (!Array.isArray(value) && !(value instanceof Map)) return 1;
    const known = this.#weights.get(value);
    if (known !== undefined) return known;
    const items = (Array.isArray(value) ? value : [...value.values()]) as RuntimeValue[];
    if (items.length > maxItems) {
      throw new TemplateLimitExceeded(`it makes a list of ${items.length} items`);
    }
    this.#work -= items.length;
    const weight = this.#allowed(items.reduce((sum, item) => sum + (item ? this.#weight(item) : 0), 1));
    if (type !== 'NamespaceValue') this.#weights.set(value, weight);
    return weight;
  }

  #allowed(weight: number): number {
    if (weight > this.#maxWeight) throw new TemplateLimitExceeded('it makes a text that is too long');
    return weight;
  }

  /**
   * The filters `indent` and `tojson` repeat spaces as often as their arguments say, before anything can be
   * counted.
   */
  #checkIndent(filter: Node | undefined, environment: Environment): void {
    const name = filter?.callee?.value;
    if (name !== 'indent' && name !== 'tojson') return;
    for (const argument of filter?.args ?? []) {
      const plain = argument.type === 'KeywordArgumentExpression' ? argument.value : argument;
      if (argument.type.endsWith('SpreadExpression')) continue;
      const { value } = this.evaluate(plain as Node, environment);
      if (typeof value === 'number' && value > maxIndent) {
        throw new TemplateLimitExceeded(`it indents by ${value}, and ${maxIndent} are allowed`);
      }
    }
  }
}

/** How much a value holds, in characters. */
function sizeOf(value: unknown): number {
  if (typeof value === 'string') return sizeOfValue + value.length;
  if (typeof value !== 'object' || value === null) return sizeOfValue;
  return Object.entries(value).reduce((sum, [key, inner]) => sum + key.length + sizeOf(inner), sizeOfValue);
}
