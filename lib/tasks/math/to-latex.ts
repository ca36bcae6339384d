import { isWords, type Token, Unreadable } from './latex.js';
import { parseDecimal, type Value } from './value.js';

const numeral = /^\d*\.?\d+$/;
/** Tokens that the parser reads as they stand, beside numerals and single letters. */
const passed: ReadonlySet<string> = new Set(
  (
    '+ - / ( ) [ ] { } ^ ! | , \\times \\cdot \\div \\frac \\sqrt \\pi \\sin \\cos \\tan \\cot ' +
    '\\sec \\csc \\arcsin \\arccos \\arctan \\sinh \\cosh \\tanh \\coth \\ln \\log \\exp \\max ' +
    '\\min \\lfloor \\rfloor \\lceil \\rceil \\sum \\prod = \\bmod \\mod'
  ).split(' '),
);
const greek: ReadonlySet<string> = new Set(
  (
    '\\alpha \\beta \\gamma \\delta \\epsilon \\varepsilon \\zeta \\eta \\theta \\iota \\kappa \\lambda ' +
    '\\mu \\nu \\xi \\rho \\sigma \\tau \\upsilon \\phi \\chi \\psi \\omega \\Gamma \\Delta \\Theta ' +
    '\\Lambda \\Xi \\Sigma \\Phi \\Psi \\Omega \\ell'
  ).split(' '),
);
/**
 * Functions that are written as a symbol before parentheses, since the parser does not know them by their
 * command.
 */
const applied: Readonly<Record<string, string>> = {
  '\\binom': 'binomial',
  '\\gcd': 'gcd',
  '\\lcm': 'lcm',
  '\\arccot': 'arccot',
  '\\arcsec': 'arcsec',
  '\\arccsc': 'arccsc',
  '\\arcsinh': 'arcsinh',
  '\\arccosh': 'arccosh',
  '\\arctanh': 'arctanh',
};

/**
 * The LaTeX that the parser is given. What it reads otherwise than people do is made plain: mixed numbers,
 * numerals with a slash between, subscripts, binomial coefficients; numerals too long for a double become
 * symbols.
 *
 * @param symbols receives the values of such numerals
 */
export function toLatex(tokens: readonly Token[], symbols: Map<string, Value>): string {
  const latex: string[] = [];
  const write = (token: Token) => {
    if (numeral.test(token)) {
      if (token.length <= 15) latex.push(token);
      else {
        const name = `numeral${symbols.size}`;
        symbols.set(name, parseDecimal(token) as Value);
        latex.push(`\\mathrm{${name}}`);
      }
    } else if (/^[a-zA-Z]$/.test(token) || passed.has(token) || greek.has(token)) latex.push(token);
    else throw new Unreadable(`${token} has no meaning here`);
  };
  for (let i = 0; i < tokens.length; i++) {
    const token = tokens[i] as Token;
    const next = tokens[i + 1];
    const previous = tokens[i - 1];
    if (isSign(token) && isSign(next) && isSign(tokens[i + 2])) {
      throw new Unreadable('three signs stand side by side');
    }
    if (numeral.test(token) && next !== undefined && numeral.test(next)) {
      throw new Unreadable('two numerals stand side by side');
    }
    if (numeral.test(token) && next === '\\frac' && !isFactor(previous)) {
      const fraction = /^\\frac \{ (\d+) \} \{ (\d+) \}/.exec(tokens.slice(i + 1, i + 8).join(' '));
      if (fraction && /^\d+$/.test(token)) {
        latex.push('(', token, '+', `\\frac{${fraction[1]}}{${fraction[2]}}`, ')');
        i += 7;
        continue;
      }
    }
    const after = tokens[i + 2] ?? '';
    if (numeral.test(token) && next === '/' && numeral.test(after) && !isFactor(previous)) {
      const following = tokens[i + 3];
      if (following !== '^' && following !== '!') {
        latex.push('\\frac', '{');
        write(token);
        latex.push('}', '{');
        write(after);
        latex.push('}');
        i += 2;
        continue;
      }
    }
    if (token === '\\binom') {
      const [top, afterTop] = group(tokens, i + 1);
      const [bottom, end] = group(tokens, afterTop);
      latex.push(`\\mathrm{binomial}(${toLatex(top, symbols)},${toLatex(bottom, symbols)})`);
      i = end - 1;
      continue;
    }
    if (
      token === '^' &&
      next === '{' &&
      tokens[i + 2] === '-' &&
      tokens[i + 3] === '1' &&
      tokens[i + 4] === '}'
    ) {
      // The inverse of a function, or a reciprocal.
      latex.push('^{-1}');
      i += 4;
      continue;
    }
    if (next === '_' && (/^[a-zA-Z]$/.test(token) || greek.has(token))) {
      const [subscript, end] = group(tokens, i + 2);
      const name = `${token}${subscript.join('')}`.replace(/[^a-zA-Z0-9]/g, '');
      latex.push(`\\mathrm{${name}sub}`);
      i = end - 1;
      continue;
    }
    if (token === '_') {
      if (!['\\log', '\\sum', '\\prod'].includes(previous ?? ''))
        throw new Unreadable('a subscript of nothing');
      latex.push('_');
      continue;
    }
    if (Object.hasOwn(applied, token)) {
      latex.push(`\\mathrm{${applied[token]}}`);
      continue;
    }
    if (token === '*') {
      if (next === '*') {
        latex.push('^');
        i++;
      } else latex.push('\\times');
    } else if (token === ':') latex.push('\\div');
    else if (token === '°') latex.push('^{\\circ}');
    else if (isWords(token)) throw new Unreadable('there are words in the expression');
    else write(token);
  }
  // The parser minds white space before a factorial; a command is parted from the letter after it.
  return latex.join(' ').replace(/(?<!\\[a-zA-Z]+) | (?![a-zA-Z])/g, '');
}

function isSign(token: Token | undefined): boolean {
  return token === '+' || token === '-';
}

/** Whether what stands before a numeral binds it, so that it begins no fraction or mixed number. */
function isFactor(token: Token | undefined): boolean {
  return (
    token === '^' || token === '_' || token === '/' || token === '\\div' || token === '!' || token === ')'
  );
}

/** The tokens of the group that begins at `start`, and where it ends. */
function group(tokens: readonly Token[], start: number): [inner: readonly Token[], end: number] {
  if (tokens[start] !== '{') throw new Unreadable('an argument is missing');
  let depth = 0;
  for (let i = start; i < tokens.length; i++) {
    if (tokens[i] === '{') depth++;
    else if (tokens[i] === '}' && --depth === 0) return [tokens.slice(start + 1, i), i + 1];
  }
  throw new Unreadable('a brace never closes');
}
