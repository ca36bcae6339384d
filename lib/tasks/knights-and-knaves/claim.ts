/** What an islander says, as a formula over who is a knight and who is a knave. Persons are indices into `names`. */
export type Claim =
  | { readonly kind: 'knight'; readonly person: number }
  | { readonly kind: 'knave'; readonly person: number }
  | { readonly kind: 'not'; readonly claim: Claim }
  | { readonly kind: BinaryKind; readonly left: Claim; readonly right: Claim };

export type BinaryKind = 'and' | 'or' | 'if' | 'iff';

/** Whether person i is a knight; undefined where it is not known. */
export type PartialAssignment = readonly (boolean | undefined)[];

/** The truth of a claim when everybody is known: `isKnight[i]` says what person i is. */
export function evaluateClaim(claim: Claim, isKnight: readonly boolean[]): boolean {
  const value = evaluatePartially(claim, isKnight);
  if (value === undefined) {
    throw new RangeError(
      `Expected an assignment of every person in the claim but received ${isKnight.length} persons`,
    );
  }
  return value;
}

/**
 * The truth of a claim by Kleene's three-valued logic, undefined where the known persons do not settle it. It is
 * sound but looks at one connective at a time: "X is a knight or X is a knave" stays undefined without X.
 */
export function evaluatePartially(claim: Claim, isKnight: PartialAssignment): boolean | undefined {
  switch (claim.kind) {
    case 'knight':
      return isKnight[claim.person];
    case 'knave':
      return negate(isKnight[claim.person]);
    case 'not':
      return negate(evaluatePartially(claim.claim, isKnight));
    default: {
      const left = evaluatePartially(claim.left, isKnight);
      const right = evaluatePartially(claim.right, isKnight);
      switch (claim.kind) {
        case 'and':
          return conjunction(left, right);
        case 'or':
          return negate(conjunction(negate(left), negate(right)));
        case 'if':
          return negate(conjunction(left, negate(right)));
        case 'iff':
          return left === undefined || right === undefined ? undefined : left === right;
      }
    }
  }
}

function negate(value: boolean | undefined): boolean | undefined {
  return value === undefined ? undefined : !value;
}

function conjunction(left: boolean | undefined, right: boolean | undefined): boolean | undefined {
  if (left === false || right === false) return false;
  return left === undefined || right === undefined ? undefined : true;
}

/** The persons that a claim speaks of, ascending and without repetition. */
export function personsOf(claim: Claim): number[] {
  const persons = new Set<number>();
  const visit = (c: Claim): void => {
    if (c.kind === 'knight' || c.kind === 'knave') persons.add(c.person);
    else if (c.kind === 'not') visit(c.claim);
    else {
      visit(c.left);
      visit(c.right);
    }
  };
  visit(claim);
  return [...persons].sort((a, b) => a - b);
}

/** How deep connectives nest: 0 for "X is a knight", 1 for "X is a knight and Y is a knave". */
export function depthOf(claim: Claim): number {
  if (claim.kind === 'knight' || claim.kind === 'knave') return 0;
  if (claim.kind === 'not') return 1 + depthOf(claim.claim);
  return 1 + Math.max(depthOf(claim.left), depthOf(claim.right));
}

/**
 * A claim in the English of the published quizzes, without a capital (other than a name's) or a full stop.
 * Connectives inside connectives stand in parentheses, so that a sentence has one reading only.
 */
export function renderClaim(claim: Claim, names: readonly string[]): string {
  switch (claim.kind) {
    case 'knight':
    case 'knave':
      return `${nameOf(names, claim.person)} is a ${claim.kind}`;
    case 'not': {
      const inner = claim.claim;
      return inner.kind === 'knight' || inner.kind === 'knave'
        ? `${nameOf(names, inner.person)} is not a ${inner.kind}`
        : `it is not the case that ${renderOperand(inner, names)}`;
    }
    default: {
      const left = renderOperand(claim.left, names);
      const right = renderOperand(claim.right, names);
      if (claim.kind === 'if') return `if ${left} then ${right}`;
      return `${left} ${claim.kind === 'iff' ? 'if and only if' : claim.kind} ${right}`;
    }
  }
}

function renderOperand(claim: Claim, names: readonly string[]): string {
  const text = renderClaim(claim, names);
  const plain =
    claim.kind === 'knight' ||
    claim.kind === 'knave' ||
    (claim.kind === 'not' && (claim.claim.kind === 'knight' || claim.claim.kind === 'knave'));
  return plain ? text : `(${text})`;
}

function nameOf(names: readonly string[], person: number): string {
  const name = names[person];
  if (name === undefined) {
    throw new RangeError(
      `Expected a person from 0 to ${names.length - 1} in the claim but received ${person}`,
    );
  }
  return name;
}

/** The ways in which the published quizzes report speech, the indirect ones last. */
const speechForms: readonly ((name: string, claim: string) => string)[] = [
  (name, claim) => `${name} said, "${claim}."`,
  (name, claim) => `"${claim}," ${name} declared.`,
  (name, claim) => `"${claim}," ${name} claimed.`,
  (name, claim) => `"${claim}," ${name} mentioned.`,
  (name, claim) => `"${claim}" - ${name}.`,
  (name, claim) => `${name} stated, "${claim}".`,
  (name, claim) => `${name} noted, "${claim}".`,
  (name, claim) => `${name} remarked, "${claim}".`,
  (name, claim) => `${name} commented, "${claim}".`,
  (name, claim) => `${name} asserted: "${claim}".`,
  (name, claim) => `${name} was heard saying, "${claim}".`,
  (name, claim) => `According to ${name}, "${claim}".`,
  (name, claim) => `As ${name} put it, "${claim}".`,
  (name, claim) => `In ${name}'s words: "${claim}".`,
  (name, claim) => `In a statement by ${name}: "${claim}".`,
  (name, claim) => `${name} said that ${claim}.`,
  (name, claim) => `${name} told you that ${claim}.`,
  (name, claim) => `${name} expressed that ${claim}.`,
];

const firstIndirectForm = speechForms.length - 3;

export const speechFormCount = speechForms.length;

/** A sentence in which `speaker` makes the claim; `form` (0 to speechFormCount - 1) selects the wording. */
export function renderSpeech(speaker: number, claim: Claim, names: readonly string[], form: number): string {
  const wording = speechForms[form];
  if (wording === undefined) {
    throw new RangeError(`Expected a speech form from 0 to ${speechFormCount - 1} but received ${form}`);
  }
  const text = renderClaim(claim, names);
  const quoted = text.charAt(0).toUpperCase() + text.slice(1);
  return wording(nameOf(names, speaker), form < firstIndirectForm ? quoted : text);
}

/** The whole quiz: the island, the inhabitants, what each said (in order of the persons), and the question. */
export function renderQuiz(
  names: readonly string[],
  statements: readonly Claim[],
  forms: readonly number[],
): string {
  const speeches = statements.map((claim, speaker) =>
    renderSpeech(speaker, claim, names, forms[speaker] ?? 0),
  );
  const list =
    names.length === 2
      ? names.join(' and ')
      : `${names.slice(0, -1).join(', ')}, and ${names[names.length - 1]}`;
  return (
    'A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves ' +
    `always lie. You meet ${names.length} inhabitants: ${list}. ${speeches.join(' ')} ` +
    'So who is a knight and who is a knave?'
  );
}
