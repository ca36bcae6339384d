/** What a motivation says, read back from its words alone. */
export interface RulesInText {
  /** The scores of each line by heading, with the scores that the line sets elsewhere. */
  readonly components: Map<string, { score: number; sets: Map<string, number> }[]>;
  /** The totals that the closing sentence lists; undefined where it lists none. */
  readonly listed: number[] | undefined;
}

const number = '[+-]?\\d+(?:\\.\\d+)?';

export function readRules(text: string): RulesInText {
  const components: RulesInText['components'] = new Map();
  let current: { score: number; sets: Map<string, number> }[] | undefined;
  let listed: number[] | undefined;
  for (const line of text.split('\n')) {
    const heading = /^([A-Z][\w ]*):$/.exec(line);
    const option = new RegExp(`^(${number}) points? `).exec(line);
    const total = /^The total is the sum of .*?: (.*) points\. Aim/.exec(line);
    if (heading) {
      current = [];
      components.set((heading[1] as string).toLowerCase(), current);
    } else if (option) {
      const sets = new Map<string, number>();
      for (const match of line.matchAll(
        new RegExp(`; the ([\\w ]+) score is then (${number}) points?`, 'g'),
      )) {
        sets.set(match[1] as string, Number(match[2]));
      }
      current?.push({ score: Number(option[1]), sets });
    } else if (total && !(total[1] as string).startsWith('from ')) {
      listed = [...(total[1] as string).matchAll(new RegExp(number, 'g'))].map((match) => Number(match[0]));
    }
  }
  return { components, listed };
}

/** Every total that follows from the numbers in the text, ascending. */
export function totalsInText({ components }: RulesInText): number[] {
  const names = [...components.keys()];
  const totals = new Set<number>();
  const visit = (i: number, total: number, set: ReadonlyMap<string, number>): void => {
    const name = names[i];
    if (name === undefined) {
      totals.add(round(total));
      return;
    }
    for (const { score, sets } of components.get(name) ?? []) {
      if (set.has(name) && set.get(name) !== score) continue;
      visit(i + 1, total + score, new Map([...sets, ...set]));
    }
  };
  visit(0, 0, new Map());
  return sorted(totals);
}

export function round(value: number): number {
  return Number(value.toPrecision(10)) + 0;
}

export function sorted(values: Iterable<number>): number[] {
  return [...new Set([...values].map(round))].sort((a, b) => a - b);
}
