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

/** From training step `step` on (0 is the first) the prompt shows `view`, until a later entry takes over. */
export interface MotivationStage {
  readonly step: number;
  readonly view: MotivationView;
}

/** A view for every training step: stages in ascending order of their steps, the first at step 0. */
export type MotivationSchedule = readonly MotivationStage[];

/** A view that stays, or one that changes as training goes on. */
export type Motivation = MotivationView | MotivationSchedule;

const accepted =
  '"none", "full", "adverse", "partial:COMPONENT" (several joined by "+"), "template:FILE", ' +
  'or a schedule of these such as "full@0,none@100"';

/**
 * Reads a motivation from the words of the command line and of config files: `none`, `full`, `adverse`,
 * `partial:correctness`, `partial:correctness+format`, `template:FILE` (a text file), or a schedule over training
 * steps such as `full@0,none@100`. Components are checked by the specification that describes itself.
 *
 * @throws MerfError INVALID_ARGUMENT, or FILE_NOT_FOUND for a template that cannot be read
 */
export function parseMotivation(text: string): Motivation {
  if (typeof text !== 'string') throw invalidArgument('motivation', accepted, text);
  const parts = text.split(',').map((part) => part.trim());
  if (parts.length === 1 && !/@\d+$/.test(text.trim())) return parseView(text.trim());
  const stages = parts.map((part): MotivationStage => {
    const match = /^(.+)@(\d+)$/.exec(part);
    if (!match) throw invalidArgument('motivation', `VIEW@STEP in every part of the schedule`, part);
    return { view: parseView(match[1] as string), step: Number(match[2]) };
  });
  checkSchedule(stages);
  return stages;
}

/**
 * The view that holds at a training step.
 *
 * @param step index of the training step, 0 is the first
 */
export function motivationAt(motivation: Motivation, step: number): MotivationView {
  if (!isSchedule(motivation)) return motivation;
  checkSchedule(motivation);
  let view: MotivationView = 'none';
  for (const stage of motivation) if (stage.step <= step) view = stage.view;
  return view;
}

/** The words that `parseMotivation` reads back as the same motivation; a template is shown by its length. */
export function formatMotivation(motivation: Motivation): string {
  if (isSchedule(motivation)) {
    return motivation.map((stage) => `${formatMotivation(stage.view)}@${stage.step}`).join(',');
  }
  if (typeof motivation === 'string') return motivation;
  if ('partial' in motivation) return `partial:${motivation.partial.join('+')}`;
  return `template of ${motivation.template.length} characters`;
}

function isSchedule(motivation: Motivation): motivation is MotivationSchedule {
  return Array.isArray(motivation);
}

function parseView(text: string): MotivationView {
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
  throw invalidArgument('motivation', accepted, text);
}

function checkSchedule(stages: MotivationSchedule): void {
  if (stages[0]?.step !== 0) {
    throw invalidArgument('motivation', 'a schedule whose first view begins at step 0', stages[0]?.step);
  }
  stages.forEach((stage, i) => {
    const previous = stages[i - 1];
    if (!Number.isSafeInteger(stage.step) || (previous && stage.step <= previous.step)) {
      throw invalidArgument('motivation', 'whole steps in ascending order in the schedule', stage.step);
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
