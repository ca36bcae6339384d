import { invalidArgument } from '../errors.js';
import type { MotivationView } from '../prompt/motivation.js';
import type { Component, RewardSpec } from './spec.js';

/** A score as the motivation writes it: with its sign, as in "+2" or "-1.5". */
export function formatScore(score: number): string {
  return score > 0 ? `+${score}` : `${score === 0 ? 0 : score}`;
}

/** The rules of a specification in words; see `RewardSpec.describe`. */
export function describeRules<Row>(spec: RewardSpec<Row>, view: MotivationView): string {
  const names = spec.components.map((component) => component.name);
  if (view === 'none') return '';
  if (view === 'full') return rules(spec, names, 1);
  if (view === 'adverse') return rules(spec, names, -1);
  if (typeof view === 'object' && 'partial' in view) {
    const unknown = view.partial.find((name) => !names.includes(name));
    if (unknown !== undefined || view.partial.length === 0) {
      throw invalidArgument('partial motivation', `one or more of ${names.join(', ')}`, unknown ?? '');
    }
    return rules(
      spec,
      names.filter((name) => view.partial.includes(name)),
      1,
    );
  }
  if (typeof view === 'object' && typeof view.template === 'string') return fill(spec, names, view.template);
  throw invalidArgument('motivation', '"none", "full", "adverse", a partial or a template', view);
}

type Sign = 1 | -1;

function rules<Row>(spec: RewardSpec<Row>, names: readonly string[], sign: Sign): string {
  const blocks = names.map((name) => block(spec, name, names, sign));
  return ['Your response is scored by these rules.', ...blocks, closing(spec, names, sign)].join('\n');
}

/** A component's heading and one line a case; implications towards components outside `shown` are left out. */
function block<Row>(spec: RewardSpec<Row>, name: string, shown: readonly string[], sign: Sign): string {
  const component = find(spec, name);
  const heading = `${capitalize(spoken(name))}:`;
  if ('range' in component) {
    const [least, greatest] = component.range.map((score) => formatScore(sign * score));
    return `${heading}\nfrom ${least} to ${greatest} points: ${clause(component.sentence)}.`;
  }
  const lines = component.cases.map((option) => {
    const consequences = Object.entries(option.implies ?? {})
      .filter(([other]) => shown.includes(other))
      .map(([other, otherCase]) => {
        const score = scoreOf(find(spec, other), otherCase);
        return `; the ${spoken(other)} score is then ${points(sign * score)}`;
      });
    return `${points(sign * option.score)} ${clause(option.sentence)}${consequences.join('')}.`;
  });
  return [heading, ...lines].join('\n');
}

/** At most this many totals are listed one by one. */
const maxListedTotals = 8;

function closing<Row>(spec: RewardSpec<Row>, names: readonly string[], sign: Sign): string {
  if (names.length === 1) return 'Aim for the highest score.';
  return `The total is the sum of ${join(names.map(spoken), 'and')}: ${totals(spec, names, sign)}. Aim for the highest total.`;
}

function totals<Row>(spec: RewardSpec<Row>, names: readonly string[], sign: Sign): string {
  const all = spec.totals(names);
  if (all && all.length <= maxListedTotals) {
    return `${join(
      all.map((total) => formatScore(sign * total)),
      'or',
    )} points`;
  }
  const { least, greatest } = spec.bounds(names);
  return `from ${formatScore(sign * least)} to ${formatScore(sign * greatest)} points`;
}

/** Fills a template's variables in; text outside of `{{ }}` stays as it is. */
function fill<Row>(spec: RewardSpec<Row>, names: readonly string[], template: string): string {
  const variables = new Map<string, () => string>([
    ['rules', () => rules(spec, names, 1)],
    ['totals', () => totals(spec, names, 1)],
  ]);
  for (const component of spec.components) {
    variables.set(`components.${component.name}`, () => block(spec, component.name, names, 1));
    if ('cases' in component) {
      for (const option of component.cases) {
        variables.set(`scores.${component.name}.${option.name}`, () => formatScore(option.score));
      }
    }
  }
  return template
    .replace(/\{\{([^{}]*)\}\}/g, (_, inner: string) => {
      const value = variables.get(inner.trim());
      if (value) return value();
      const known = [...variables.keys()].map((name) => `{{${name}}}`).join(', ');
      throw invalidArgument('the motivation template', `one of ${known}`, `{{${inner}}}`);
    })
    .trim();
}

function find<Row>(spec: RewardSpec<Row>, name: string): Component<Row> {
  const component = spec.components.find((candidate) => candidate.name === name);
  if (!component) throw invalidArgument('component', `one of ${spec.components.map((c) => c.name)}`, name);
  return component;
}

function scoreOf<Row>(component: Component<Row>, caseName: string): number {
  const option = 'cases' in component ? component.cases.find((c) => c.name === caseName) : undefined;
  if (!option) throw invalidArgument('case', `a case of ${component.name}`, caseName);
  return option.score;
}

function points(score: number): string {
  return `${formatScore(score)} ${Math.abs(score) === 1 ? 'point' : 'points'}`;
}

function clause(sentence: string): string {
  return sentence.trim().replace(/\.$/, '');
}

function spoken(name: string): string {
  return name.replace(/[_-]/g, ' ');
}

function capitalize(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function join(items: readonly string[], word: 'and' | 'or'): string {
  return items.length < 2
    ? items.join('')
    : `${items.slice(0, -1).join(', ')} ${word} ${items[items.length - 1]}`;
}
