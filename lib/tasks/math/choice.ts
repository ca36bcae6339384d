interface Choice {
  readonly letter: string;
  /** Whether the letter stands alone, without parentheses and without what it stands for. */
  readonly isBare: boolean;
  readonly isAlone: boolean;
}

/** The letter of a multiple choice: `(C)`, `\text{(C)}`, `C.`, `(C) 12`, `\textbf{C}`, `C`. */
export function choiceOf(text: string): Choice | undefined {
  if (text.length > 200) return undefined;
  const plain = text
    .replace(/\\(?:text|textbf|textrm|mathrm|mathbf|mbox|bf|rm)\b\s*/g, '')
    .replace(/\\[ ,;!]|~/g, ' ')
    .replace(/[{}$*]|\\[()]/g, '')
    .replace(/^\s*(?:option|choice|answer)\s+(?=\(?[A-J])/i, '')
    .trim();
  const isText = /^\\(?:text|textbf|textrm|mathrm|mbox)\s*\{\s*[A-J]\s*\}$/.test(text);
  const inParentheses = /^\(([A-Ja-j])\)[.:]?(?:$|\s+[^\s+*/^=-])/.exec(plain)?.[1];
  const letter = inParentheses ?? /^([A-J])(?:[).:](?:$|\s)|$)/.exec(plain)?.[1];
  if (!letter) return undefined;
  return {
    letter: letter.toUpperCase(),
    isBare: plain.length === 1 && !isText,
    isAlone: /^\(?.\)?[.:]?$/.test(plain),
  };
}

/** Whether two answers choose the same; undefined where the reference is no choice. */
export function compareChoices(answer: string, reference: string): boolean | undefined {
  const wanted = choiceOf(reference);
  if (!wanted) return undefined;
  const given = choiceOf(answer);
  if (!wanted.isAlone) return given && !given.isBare ? given.letter === wanted.letter : undefined;
  if (given && !(given.isBare && wanted.isBare)) return given.letter === wanted.letter;
  // A bare letter may be a variable as well.
  return wanted.isBare ? undefined : false;
}
