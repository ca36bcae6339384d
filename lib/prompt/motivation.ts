import { readFileSync } from 'node:fs';
import { invalidArgument, MerfError } from '../errors.js';

/**
 * What the prompt says about the reward. Every view is words only: none of them touches a score.
 * - `none`: nothing;
 * - `full`: every component, every case, every score;
 * - `adverse`: the full text with every score negated;
 * - `partial`: the chosen components, no word of the others;
 * - `template`: the user's text, with `{{rules}}`, `{{totals}}`, `{{components.NAME}}` and
 *   `{{scores.COMPONENT.CASE}}` filled in from the specification.
 */
export type MotivationView =
  | 'none'
  | 'full'
  | 'adverse'
  | { readonly partial: readonly string[] }
  | { readonly template: string };

/** From training step `step` on (0 is the first) holds `value`, until a later stage takes over. */
export interface Stage<Value> {
  readonly step: number;
  readonly value: Value;
}

/** A value for every training step: stages in ascending order of their steps, the first at step 0. */
export type Schedule<Value> = readonly Stage<Value>[];

/** The views that the completions of a group are divided over, each by as many shares as it occurs. */
export type MotivationMix = readonly MotivationView[];

/** A mix for every training step; a single view throughout is a mix of one in a schedule of one. */
export type Motivation = Schedule<MotivationMix>;

/** Under which prompts a completion is learned: the one that it was drawn under, or that of a view. */
export type LearnView = 'same' | MotivationView;

const acceptedViews =
  '"none", "full", "adverse", "partial:COMPONENT" (several joined by "+"), "template:FILE"';
const acceptedForms = 'a mix of these such as "full/none", or a schedule such as "full@0,none@100"';

/**
 * Reads a motivation from the words of the command line and of config files: a view (`none`, `full`, `adverse`,
 * `partial:correctness`, `partial:correctness+format`, `template:FILE` for a text file), a mix of views such as
 * `full/none` or `full/full/none`, or a schedule of these over training steps such as `full/none@0,none@100`. Components
 * are checked by the specification that describes itself.
 *
 * @throws MerfError INVALID_ARGUMENT, or FILE_NOT_FOUND for a template that cannot be read
 */
export function parseMotivation(text: string): Motivation {
  return parseSchedule(text, 'motivation', `${acceptedViews}, ${acceptedForms}`, (part, fail) =>
    mixParts(part).map((one) => parseView(one, fail)),
  );
}

/** A single view in the same words. @throws MerfError as `parseMotivation` does, for mixes and schedules too */
export function parseMotivationView(text: string): MotivationView {
  const [stage, ...later] = parseMotivation(text);
  const [view, ...others] = (stage as Stage<MotivationMix>).value;
  if (later.length > 0 || others.length > 0) {
    throw invalidArgument('motivation', `one view (${acceptedViews})`, text);
  }
  return view as MotivationView;
}

/**
 * Reads under which prompts completions are learned: `same`, a view, several joined by "/" (each completion is learned
 * under all of them), `both` for `same/none`, or a schedule of these.
 *
 * @throws MerfError INVALID_ARGUMENT, FILE_NOT_FOUND
 */
export function parseLearnUnder(text: string): Schedule<readonly LearnView[]> {
  return parseSchedule(
    text,
    'learnUnder',
    `"same", "both", ${acceptedViews}, ${acceptedForms}`,
    (part, fail) =>
      mixParts(part).flatMap((one): LearnView[] => {
        if (one === 'both') return ['same', 'none'];
        return [one === 'same' ? one : parseView(one, fail)];
      }),
  );
}

/** The words of a motivation, or of what completions are learned under, with the path of each template replaced. */
export function replaceTemplatePaths(text: string, replace: (path: string) => string): string {
  const stages = text.split(',').map((stage) => {
    const [, mix = '', step = ''] = /^(.*?)(@\d+)?$/s.exec(stage.trim()) ?? [];
    const views = mixParts(mix).map((view) =>
      view.replace(/^template:(.+)$/s, (_, path) => `template:${replace(path)}`),
    );
    return `${views.join('/')}${step}`;
  });
  return stages.join(',');
}

/**
 * The value of a schedule that holds at a training step.
 *
 * @param step index of the training step, 0 is the first
 */
export function stageAt<Value>(schedule: Schedule<Value>, step: number): Value {
  let current = schedule[0] as Stage<Value>;
  for (const stage of schedule) if (stage.step <= step) current = stage;
  return current.value;
}

/** The view of completion `index` of `count` under a mix: the shares lie beside each other, in the mix's order. */
export function viewOf(mix: MotivationMix, index: number, count: number): MotivationView {
  return mix[Math.floor((index * mix.length) / count)] as MotivationView;
}

/** The words that `parseMotivation` reads back as the same view or mix; a template is shown by its length. */
export function formatMotivation(motivation: MotivationView | MotivationMix): string {
  if (isMix(motivation)) return motivation.map(formatMotivation).join('/');
  if (typeof motivation === 'string') return motivation;
  if ('partial' in motivation) return `partial:${motivation.partial.join('+')}`;
  return `template of ${motivation.template.length} characters`;
}

export function isMix(motivation: MotivationView | MotivationMix): motivation is MotivationMix {
  return Array.isArray(motivation);
}

/** What a schedule or mix of the words reads as, part by part, where a part that is none of them fails. */
type Fail = () => never;

function parseSchedule<Value>(
  text: string,
  argument: string,
  accepted: string,
  parse: (part: string, fail: Fail) => Value,
): Schedule<Value> {
  const fail = (): never => {
    throw invalidArgument(argument, accepted, text);
  };
  if (typeof text !== 'string') return fail();
  const parts = text.split(',').map((part) => part.trim());
  if (parts.length === 1 && !/@\d+$/.test(text.trim())) {
    return [{ step: 0, value: parse(text.trim(), fail) }];
  }
  const stages = parts.map((part): Stage<Value> => {
    const match = /^(.+)@(\d+)$/.exec(part);
    if (!match) throw invalidArgument(argument, 'VIEW@STEP in every part of the schedule', part);
    return { step: Number(match[2]), value: parse(match[1] as string, fail) };
  });
  checkSteps(stages, argument);
  return stages;
}

/** The parts of a mix. A slash within the path of a template is none between two views. */
function mixParts(text: string): string[] {
  return text
    .split(/\/(?=(?:none|full|adverse|same|both)(?:\/|$)|partial:|template:)/)
    .map((part) => part.trim());
}

function parseView(text: string, fail: Fail): MotivationView {
  if (text === 'none' || text === 'full' || text === 'adverse') return text;
  const [, kind, value] = /^(partial|template):(.+)$/.exec(text) ?? [];
  if (kind === 'partial' && value !== undefined) {
    const partial = value.split('+').map((name) => name.trim());
    if (partial.some((name) => name === '')) {
      throw invalidArgument('motivation', 'component names after "partial:"', text);
    }
    return { partial };
  }
  if (kind === 'template' && value !== undefined) {
    try {
      return { template: readFileSync(value, 'utf8') };
    } catch (cause) {
      throw new MerfError(
        'FILE_NOT_FOUND',
        `Cannot read the motivation template ${value}: ${String(cause)}`,
        {
          cause,
        },
      );
    }
  }
  return fail();
}

function checkSteps(stages: Schedule<unknown>, argument: string): void {
  if (stages[0]?.step !== 0) {
    throw invalidArgument(argument, 'a schedule whose first view begins at step 0', stages[0]?.step);
  }
  stages.forEach((stage, i) => {
    const previous = stages[i - 1];
    if (!Number.isSafeInteger(stage.step) || (previous && stage.step <= previous.step)) {
      throw invalidArgument(argument, 'whole steps in ascending order in the schedule', stage.step);
    }
  });
}

/**
 * The messages with the motivation as a paragraph of its own at the end of the system message; one is put in front
 * where there is none. An empty motivation leaves the messages as they are.
 */
export function withMotivation<Message extends { readonly role: string; readonly content: string | null }>(
  messages: readonly Message[],
  motivation: string,
): (Message | { role: 'system'; content: string })[] {
  if (motivation === '') return [...messages];
  const [first, ...rest] = messages;
  if (first?.role !== 'system') return [{ role: 'system', content: motivation }, ...messages];
  const content = `${first.content ?? ''}`.trimEnd();
  return [{ ...first, content: content === '' ? motivation : `${content}\n\n${motivation}` }, ...rest];
}
