/**
 * Answers as tokens, with one spelling for what LaTeX and plain text write in many ways. A token is a command
 * (`\frac`), a numeral (`12.5`), a single character, or words: `"` and the words themselves, lower case.
 */
export type Token = string;

/** Thrown for an answer that is too long or too deeply nested, or whose braces do not match. */
export class Unreadable extends Error {}

export const maxLength = 2000;
const maxTokens = 600;
const maxDepth = 24;

const characters: Readonly<Record<string, string>> = {
  '−': '-',
  '–': '-',
  '—': '-',
  '×': '\\times ',
  '·': '\\cdot ',
  '⋅': '\\cdot ',
  '÷': '\\div ',
  '±': '\\pm ',
  '∓': '\\mp ',
  π: '\\pi ',
  θ: '\\theta ',
  α: '\\alpha ',
  β: '\\beta ',
  φ: '\\phi ',
  λ: '\\lambda ',
  μ: '\\mu ',
  ω: '\\omega ',
  '√': '\\sqrt ',
  '∞': '\\infty ',
  '°': '^\\circ ',
  º: '^\\circ ',
  '≤': '\\le ',
  '≥': '\\ge ',
  '⩽': '\\le ',
  '⩾': '\\ge ',
  '≠': '\\ne ',
  '≈': '\\approx ',
  '∪': '\\cup ',
  '∩': '\\cap ',
  '∅': '\\emptyset ',
  '∈': '\\in ',
  ℝ: '\\R ',
  '⟨': '\\langle ',
  '⟩': '\\rangle ',
  '½': '\\frac12 ',
  '⅓': '\\frac13 ',
  '⅔': '\\frac23 ',
  '¼': '\\frac14 ',
  '¾': '\\frac34 ',
  '⁰': '^{0}',
  '¹': '^{1}',
  '²': '^{2}',
  '³': '^{3}',
  '⁴': '^{4}',
  '⁵': '^{5}',
  '⁶': '^{6}',
  '⁷': '^{7}',
  '⁸': '^{8}',
  '⁹': '^{9}',
  '％': '%',
  '，': ',',
  '（': '(',
  '）': ')',
  '’': "'",
};
const unusual = new RegExp(`[${Object.keys(characters).join('')}]`, 'gu');

/** Commands with arguments that say the same as another. */
const spellings: Readonly<Record<string, string>> = {
  '\\dfrac': '\\frac',
  '\\tfrac': '\\frac',
  '\\cfrac': '\\frac',
  '\\dbinom': '\\binom',
  '\\tbinom': '\\binom',
};

/** Commands that say the same as the token after the colon. */
const synonyms: Readonly<Record<string, string>> = {
  '\\leq': '\\le',
  '\\leqslant': '\\le',
  '\\geq': '\\ge',
  '\\geqslant': '\\ge',
  '\\neq': '\\ne',
  '\\lt': '<',
  '\\gt': '>',
  '\\ast': '*',
  '\\lbrace': '\\{',
  '\\rbrace': '\\}',
  '\\lbrack': '[',
  '\\rbrack': ']',
  '\\lparen': '(',
  '\\rparen': ')',
  '\\lvert': '|',
  '\\rvert': '|',
  '\\vert': '|',
  '\\mid': '|',
  '\\colon': ':',
  '\\varnothing': '\\emptyset',
  '\\degree': '°',
  '\\deg': '°',
  '\\%': '%',
  '\\$': '$',
  '\\#': '#',
  '\\&': '&',
  '\\_': '_',
  '\\textdollar': '$',
  '\\pounds': '£',
  '\\euro': '€',
  '\\reals': '\\R',
  '\\varphi': '\\phi',
  '\\imath': 'i',
  '\\lg': '\\log',
  '\\arctg': '\\arctan',
  '\\tg': '\\tan',
  '\\ctg': '\\cot',
};

function setOf(words: string): ReadonlySet<string> {
  return new Set(words.split(' '));
}

/** Commands that say nothing: sizes, styles and space. */
const silent = setOf(
  '\\left \\right \\bigl \\bigr \\Bigl \\Bigr \\biggl \\biggr \\big \\Big \\bigg \\Bigg ' +
    '\\displaystyle \\textstyle \\scriptstyle \\limits \\nolimits \\quad \\qquad \\thinspace ' +
    '\\enspace \\bf \\rm \\it \\cal \\nonumber \\strut \\mathstrut',
);
const silentSigns = new Set([
  '\\,',
  '\\;',
  '\\:',
  '\\!',
  '\\>',
  '\\ ',
  '\\\n',
  '\\/',
  '\\-',
  '\\(',
  '\\)',
  '\\[',
  '\\]',
  '~',
]);

/** Commands whose argument is set in upright letters: words, or the name of a function. */
const wordCommands = setOf(
  '\\text \\textbf \\textit \\textrm \\textsf \\texttt \\textnormal \\textup \\mbox \\hbox ' +
    '\\emph \\mathrm \\operatorname \\operatorname* \\underline',
);
/** Commands whose argument is read as if they were not there. */
const styleCommands = setOf(
  '\\mathbf \\mathit \\mathsf \\mathtt \\boldsymbol \\bm \\mathcal \\mathnormal \\boxed \\fbox ' +
    '\\framebox \\ensuremath \\vec \\textcolor \\color \\mathrel \\mathbin',
);
/** Commands that vanish with their argument. */
const spaceCommands = setOf('\\hspace \\hspace* \\vspace \\phantom \\hphantom \\vphantom \\label');
/** Commands whose first argument is no part of the answer, as the name of a colour. */
const colorCommands = setOf('\\textcolor \\color');

const functions = setOf(
  'sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ' +
    'arcsinh arccosh arctanh ln log exp sqrt gcd lcm max min det',
);
/** Names in plain text that stand for a command. */
const names: Readonly<Record<string, string>> = {
  ...Object.fromEntries([...functions].map((name) => [name, `\\${name}`])),
  asin: '\\arcsin',
  acos: '\\arccos',
  atan: '\\arctan',
  pi: '\\pi',
  Pi: '\\pi',
  theta: '\\theta',
  alpha: '\\alpha',
  beta: '\\beta',
  infinity: '\\infty',
  inf: '\\infty',
  infty: '\\infty',
  oo: '\\infty',
  cup: '\\cup',
  frac: '\\frac',
};

/** Commands, numerals (perhaps before repeating digits), words, white space, and any other character. */
const scanner = new RegExp(
  [
    /\\(?:(?:operatorname|hspace|vspace)\*|[a-zA-Z]+|[\s\S])/,
    /\d+(?:\.(?:\d+|(?=\\overline)))?|\.\d+/,
    /[a-zA-Z]+|\s+|[\s\S]/,
  ]
    .map((pattern) => pattern.source)
    .join('|'),
  'gu',
);
/**
 * A numeral whose thousands are parted by what can part nothing else: `1{,}000`, `1,\!000`, `1\,000`, `10
 * 000`.
 */
const clearThousands = /(?<![\d.])\d{1,3}(?:(?:\{,\}|,\s?\\!\s?|\\[,;: ]| )\d{3})+(?![\d])/g;
/** A whole answer that is one numeral with commas, perhaps with a sign, a currency or a unit around it. */
const commaThousands = /(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])/g;

/** Whether commas that part three digits may part thousands or the items of a list. */
export function hasCommaThousands(text: string): boolean {
  return text.search(commaThousands) >= 0;
}

/**
 * The tokens of an answer.
 *
 * @param joinThousands whether `1,234` is one number and no list of two
 * @throws Unreadable
 */
export function tokenize(text: string, joinThousands = false): Token[] {
  if (text.length > maxLength) throw new Unreadable('the answer is too long');
  let source = text
    .replace(unusual, (character) => characters[character] as string)
    // Space between the rows of a matrix, what Markdown sets in bold, and quotation marks.
    .replace(/(?<=\\\\)\s*\[-?[\d.]+\s?(?:pt|em|ex|mm|cm)\]/g, '')
    .replace(/^\*\*|\*\*$|["“”]/g, '')
    .replace(clearThousands, (numeral) => numeral.replace(/\D/g, ''))
    .trim();
  if (joinThousands) source = source.replace(commaThousands, (numeral) => numeral.replaceAll(',', ''));
  source = source.replace(/(?<=\d)\.(?=\s*(?:$|[,;)\]}$]))/g, '').replace(/[\s.;,]+$/, '');
  if (/\\$/.test(source)) source = source.slice(0, -1);
  // Mathematics within dollar signs; a single dollar sign before a number is a currency.
  if (/^\$[^$]+\$$/.test(source) || /^\$\$[^$]+\$\$$/.test(source)) source = source.replace(/^\$+|\$+$/g, '');
  const words = plainWords(source);
  if (words !== undefined) return [`"${words}`];
  // A numeral and words in plain text, as "12 square feet"; and a mixed number, as "1 1/2".
  source = source
    .replace(
      /^([^a-zA-Z\\]*[\d%)])\s*([a-zA-Z][a-zA-Z.,\s]*)(\^\s*\{?\d\}?)?$/,
      (whole, front, back, power) =>
        areWords(back) ? `${front}\\text{${back.trim()}}${power ?? ''}` : whole,
    )
    .replace(
      /^([-+]?\d+)\s+(\d+)\s*\/\s*(\d+)(?![\d/])/,
      (_, whole, top, bottom) => `${whole}\\frac{${top}}{${bottom}}`,
    );
  const tokens = new Reader(source.match(scanner) ?? []).read();
  if (tokens.length > maxTokens) throw new Unreadable('the answer is too long');
  return tokens;
}

/**
 * The words of an answer that is nothing but words in plain text; a single letter or two may be variables.
 */
function plainWords(source: string): string | undefined {
  if (!/^[a-zA-Z][a-zA-Z\s'’.,-]*$/.test(source)) return undefined;
  return !source.includes(',') && areWords(source) ? normalizeWords(source) : undefined;
}

function areWords(text: string): boolean {
  const found: string[] = text.match(/[a-zA-Z]+/g) ?? [];
  if (found.some(isFunctional) || found.includes('and') || found.includes('or')) return false;
  return found.some((word) => word.length >= 4 || unitWords.has(word.toLowerCase()));
}

function isFunctional(word: string): boolean {
  return Object.hasOwn(names, word);
}

/** Short words that follow numbers as units or answer by themselves, and are no product of variables. */
const unitWords = setOf(
  'cm mm km ft kg mg lb lbs oz hr hrs min sec mph kph mi yd pm am usd men day cat dog cup sq ' +
    'rad deg yrs year inch pts ways odd yes no red boy girl one two six ten mon tue wed thu fri ' +
    'sat sun',
);

export function normalizeWords(text: string): string {
  return text
    .toLowerCase()
    .replace(/\\[,;:! ]|~/g, ' ')
    .replace(/\\(?=[%$])/g, '')
    .replace(/^[\s.,;:]+|[\s.,;:!]+$/g, '')
    .replace(/\b([ap])\.\s?m\b/g, '$1m')
    .replace(/\s+/g, ' ');
}

export function isWords(token: Token | undefined): boolean {
  return token?.startsWith('"') ?? false;
}

class Reader {
  readonly #raw: string[];
  #position = 0;

  constructor(raw: string[]) {
    this.#raw = raw;
  }

  read(): Token[] {
    const tokens: Token[] = [];
    this.#sequence(tokens, 0);
    if (this.#position < this.#raw.length) throw new Unreadable('a brace closes that never opened');
    return tokens;
  }

  /** Reads up to the brace that closes this group, or to the end of the outermost one. */
  #sequence(tokens: Token[], depth: number): void {
    while (this.#position < this.#raw.length && this.#raw[this.#position] !== '}') this.#item(tokens, depth);
  }

  #item(tokens: Token[], depth: number): void {
    if (depth > maxDepth) throw new Unreadable('the answer nests too deeply');
    const read = this.#raw[this.#position++] as string;
    const raw = Object.hasOwn(spellings, read) ? (spellings[read] as string) : read;
    if (/^\s/.test(raw)) return;
    if (raw === '{') {
      const inner = this.#rest(depth);
      // A comma in braces parts thousands, braces around a whole item say nothing.
      tokens.push(...(inner.length === 1 ? inner : ['{', ...inner, '}']));
      return;
    }
    if (/^[a-zA-Z]/.test(raw)) {
      this.#letters(raw, tokens, depth);
      return;
    }
    if (wordCommands.has(raw)) {
      this.#words(raw, tokens, depth);
      return;
    }
    if (colorCommands.has(raw)) {
      this.#argumentText();
      return;
    }
    if (styleCommands.has(raw)) return;
    if (spaceCommands.has(raw)) {
      this.#argumentText();
      return;
    }
    if (raw === '\\mathbb') {
      const argument = this.#argumentText().trim();
      tokens.push(argument === 'R' ? '\\R' : `\\mathbb${argument}`);
      return;
    }
    if (raw === '\\frac' || raw === '\\binom') {
      const top = this.#argument(depth, 1);
      const bottom = this.#argument(depth, 1);
      tokens.push(raw, '{', ...top, '}', '{', ...bottom, '}');
      return;
    }
    if (raw === '\\sqrt') {
      this.#root(tokens, depth);
      return;
    }
    if (raw === '\\begin' || raw === '\\end') {
      tokens.push(`${raw}{${this.#argumentText().replace('*', '')}}`);
      // The column layout of an array is no part of it.
      if (tokens.at(-1) === '\\begin{array}' && this.#next() === '{') this.#argumentText();
      return;
    }
    if (raw === '\\overline' && /^\d/.test(tokens.at(-1) ?? '')) {
      this.#repeating(tokens);
      return;
    }
    if (raw === '^' || raw === '_') {
      const argument = this.#argument(depth);
      const isDegree = argument.length === 1 && (argument[0] === '\\circ' || argument[0] === '°');
      if (raw === '^' && isDegree) tokens.push('°');
      else tokens.push(raw, '{', ...argument, '}');
      return;
    }
    if ((raw === '\\left' || raw === '\\right') && this.#next() === '.') {
      this.#position++;
      return;
    }
    if (!silent.has(raw) && !silentSigns.has(raw)) {
      tokens.push(Object.hasOwn(synonyms, raw) ? (synonyms[raw] as string) : raw);
    }
  }

  /** The rest of the group whose opening brace was read. */
  #rest(depth: number): Token[] {
    const inner: Token[] = [];
    this.#sequence(inner, depth + 1);
    if (this.#raw[this.#position] !== '}') throw new Unreadable('a brace never closes');
    this.#position++;
    return inner;
  }

  /** The raw item that comes next, white space left out. */
  #next(): string | undefined {
    while (/^\s/.test(this.#raw[this.#position] ?? '')) this.#position++;
    return this.#raw[this.#position];
  }

  /**
   * @param digits how many digits of a numeral without braces are taken, as TeX does; all of them by default
   */
  #argument(depth: number, digits?: number): Token[] {
    const raw = this.#next();
    if (raw === undefined || raw === '}') throw new Unreadable('an argument is missing');
    if (raw === '{') {
      this.#position++;
      return this.#rest(depth);
    }
    if (digits !== undefined && /^\d{2,}/.test(raw)) {
      this.#raw[this.#position] = raw.slice(digits);
      return [raw.slice(0, digits)];
    }
    if (/^[a-zA-Z]{2,}/.test(raw)) {
      this.#raw[this.#position] = raw.slice(1);
      return [raw.slice(0, 1)];
    }
    const tokens: Token[] = [];
    this.#item(tokens, depth + 1);
    // A sign takes what it stands before with it, as in `x^-1`.
    if (tokens.length === 1 && (tokens[0] === '-' || tokens[0] === '+'))
      tokens.push(...this.#argument(depth));
    return tokens;
  }

  /** The text of the next argument as it stands. */
  #argumentText(): string {
    if (this.#next() !== '{') return this.#raw[this.#position++] ?? '';
    let text = '';
    let depth = 0;
    for (; this.#position < this.#raw.length; this.#position++) {
      const raw = this.#raw[this.#position] as string;
      if (raw === '}' && --depth === 0) {
        this.#position++;
        return text;
      }
      if (depth > 0) text += raw;
      if (raw === '{') depth++;
    }
    throw new Unreadable('a brace never closes');
  }

  #letters(raw: string, tokens: Token[], depth: number): void {
    const command = Object.hasOwn(names, raw) ? names[raw] : undefined;
    if (command !== undefined) {
      // The command stands where the word stood, and is read in its place.
      this.#raw[--this.#position] = command;
      this.#item(tokens, depth);
      return;
    }
    const [, name, variable] = /^(sin|cos|tan|cot|sec|csc|ln|log|sqrt)([a-z])$/.exec(raw) ?? [];
    if (name && variable) {
      tokens.push(`\\${name}`, variable);
    } else if (raw === 'and' || raw === 'or' || raw.length >= 4 || unitWords.has(raw)) {
      tokens.push(`"${raw.toLowerCase()}`);
    } else tokens.push(...raw);
  }

  #words(command: string, tokens: Token[], depth: number): void {
    const text = this.#argumentText();
    const name = text.replace(/\\[,;:! ]|\s/g, '');
    const isUpright = command === '\\mathrm' || command.startsWith('\\operatorname');
    if (functions.has(name) || (isUpright && /^[a-zA-Z]$/.test(name))) {
      tokens.push(functions.has(name) ? `\\${name}` : name);
      return;
    }
    if (/\\[a-zA-Z]|[\^_{}]/.test(text) || !/[a-zA-Z]/.test(text)) {
      // Mathematics in upright letters, and text without letters, is read as what it says.
      const inner = new Reader(text.replace(/\\[()]|(?<!\\)\$/g, '').match(scanner) ?? []);
      inner.#sequence(tokens, depth + 1);
      return;
    }
    const words = normalizeWords(text);
    if (words === '') return;
    if (isWords(tokens.at(-1))) tokens.push(`"${(tokens.pop() as string).slice(1)} ${words}`);
    else tokens.push(`"${words}`);
  }

  #root(tokens: Token[], depth: number): void {
    if (this.#next() === '[') {
      this.#position++;
      const degree: Token[] = [];
      while (this.#next() !== ']') {
        if (this.#position >= this.#raw.length) throw new Unreadable('the degree of a root never ends');
        this.#item(degree, depth + 1);
      }
      this.#position++;
      tokens.push('\\sqrt', '[', ...degree, ']', '{', ...this.#argument(depth), '}');
      return;
    }
    if (this.#next() !== '(') {
      tokens.push('\\sqrt', '{', ...this.#argument(depth), '}');
      return;
    }
    // In plain text parentheses take the place of braces.
    const inner: Token[] = [];
    let open = 0;
    do {
      const start = inner.length;
      if (this.#position >= this.#raw.length) throw new Unreadable('a parenthesis never closes');
      this.#item(inner, depth + 1);
      const added = inner[start];
      if (added === '(') open++;
      else if (added === ')') open--;
    } while (open > 0);
    tokens.push('\\sqrt', '{', ...inner.slice(1, -1), '}');
  }

  /** `0.1\overline{6}`: the digits come again and again, which is a fraction. */
  #repeating(tokens: Token[]): void {
    const digits = this.#argumentText().trim();
    const before = tokens.at(-1) as string;
    const [whole = '', fraction = ''] = before.split('.');
    if (!/^\d{1,30}$/.test(digits) || fraction.length > 30) throw new Unreadable('odd repeating digits');
    tokens.pop();
    const top = BigInt(whole + fraction + digits) - BigInt(whole + fraction);
    const bottom = `${'9'.repeat(digits.length)}${'0'.repeat(fraction.length)}`;
    tokens.push('\\frac', '{', String(top), '}', '{', bottom, '}');
  }
}
