import { z } from 'zod';
import type { MotivationView } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/index.js';
import {
  type Episode,
  type EpisodeGroup,
  type EpisodePrompt,
  episodePrompt,
  type RolloutTask,
  type RolloutTokenizer,
  type Turn,
} from '../rollout/index.js';
import type { RowSource } from '../tasks/index.js';
import { Random } from '../tasks/random.js';
import { isWithoutSignal } from './advantages.js';
import { shareRight } from './difficulty.js';
import type { DrawnGroup } from './draw.js';
import type { GrpoSettings } from './settings.js';

export type ReplaySettings = Pick<GrpoSettings, 'replay' | 'replayCorrect' | 'seed'>;

/** A group that an earlier step drew. */
export interface ReplayedGroup<Row> extends EpisodeGroup<Row> {
  readonly replayed: number;
}

/** What a group is made of again: its row and prompts follow from the task, numbers are packed. */
interface KeptGroup {
  step: number;
  /** The stage of a curriculum whose rows the position counts. */
  stage: string;
  position: number;
  /** The chance to be replayed, relative to that of the others. */
  priority: number;
  episodes: KeptEpisode[];
}

type KeptEpisode = Omit<Episode, 'prompt' | 'turns'> & { view: MotivationView; turns: KeptTurn[] };
type Packed<T> = { [Key in keyof T]: T[Key] extends Int32Array | Float32Array ? string : T[Key] };
type KeptTurn = Turn extends infer One ? (One extends Turn ? Packed<One> : never) : never;

/** Where the rows of groups come from. */
export interface ReplayStage<Row> {
  name: string;
  task: RolloutTask<Row> & { readonly spec: RewardSpec<Row> };
  rows: RowSource<Row>;
}

// Draws of its own, apart from the seed's other uses.
const stream = 0x7265706cn << 32n;

/**
 * The last groups in which few completions were right, which are learned again in the place of groups without a signal
 * (selective sample replay, VL-Rethinker, arXiv:2504.08837; rare successes, EFRame, arXiv:2506.22200). A group is chosen
 * with a probability in proportion to its mean absolute advantage. Its tokens keep the log-probabilities that they were
 * drawn with, so the loss's clipped importance ratio makes up for the policy having moved on.
 */
export class Replay<Row> {
  readonly #settings: ReplaySettings;
  #groups: KeptGroup[] = [];

  constructor(settings: ReplaySettings) {
    this.#settings = settings;
  }

  /** Up to `count` different groups of the stage for step `step`; they stay here. */
  choose(
    step: number,
    count: number,
    stage: ReplayStage<Row> & { tokenizer: RolloutTokenizer },
  ): ReplayedGroup<Row>[] {
    const random = new Random(stream ^ BigInt(this.#settings.seed), step);
    const left = this.#groups.filter((group) => group.stage === stage.name);
    const chosen: KeptGroup[] = [];
    while (chosen.length < count && left.length > 0) {
      let draw = random.uniform() * left.reduce((sum, { priority }) => sum + priority, 0);
      const found = left.findIndex(({ priority }) => {
        draw -= priority;
        return draw < 0;
      });
      // Rounding may leave the draw a hair beyond the last.
      chosen.push(...left.splice(found < 0 ? left.length - 1 : found, 1));
    }
    return chosen.map((group) => unpackGroup(group, stage));
  }

  /** Takes what is worth it of the groups that step `step` drew, once it is over. */
  note(
    step: number,
    stage: ReplayStage<Row>,
    groups: readonly DrawnGroup<Row>[],
    advantages: readonly (readonly number[])[],
  ): void {
    const { replay, replayCorrect } = this.#settings;
    const { name, task } = stage;
    for (const [i, group] of groups.entries()) {
      const { episodes, position } = group;
      const own = advantages[i] as number[];
      const right = shareRight(episodes, task.spec);
      if (right === 0 || right > replayCorrect || isWithoutSignal(own)) continue;
      const priority = own.reduce((sum, advantage) => sum + Math.abs(advantage), 0) / own.length;
      this.#groups.push({ step, stage: name, position, priority, episodes: episodes.map(packEpisode) });
    }
    this.#groups = this.#groups.slice(-replay);
  }

  save(): unknown {
    return this.#groups;
  }

  load(state: unknown): void {
    keptGroups.parse(state);
    this.#groups = state as KeptGroup[];
  }
}

const packed = z.string().refine((text) => Buffer.from(text, 'base64').length % 4 === 0, {
  message: 'expected the bytes of numbers of four bytes each',
});
const lengthsAgree = ({ tokens, logprobs, entropies }: Record<'tokens' | 'logprobs' | 'entropies', string>) =>
  [logprobs, entropies].every(({ length }) => length === tokens.length);
const keptTurn = z.discriminatedUnion('role', [
  z
    .looseObject({
      role: z.literal('model'),
      text: z.string(),
      tokens: packed,
      logprobs: packed,
      entropies: packed,
      finishReason: z.enum(['stop', 'length', 'stop_string', 'pending']),
    })
    .refine(lengthsAgree, { message: 'expected as many log-probabilities and entropies as tokens' }),
  z.looseObject({ role: z.literal('environment'), text: z.string(), tokens: packed }),
]);
const keptView = z.union([
  z.enum(['none', 'full', 'adverse']),
  z.object({ partial: z.array(z.string()) }),
  z.object({ template: z.string() }),
]);
const keptEpisode = z.looseObject({
  view: keptView,
  turns: z.array(keptTurn).min(1),
  end: z.enum(['stop', 'stop_string', 'length', 'turns', 'failed']),
  completion: z.looseObject({ text: z.string(), raw: z.string(), turns: z.array(z.unknown()) }),
  reward: z.looseObject({
    total: z.number(),
    parts: z.record(z.string(), z.looseObject({ case: z.string(), score: z.number() })),
  }),
});
const keptGroups = z.array(
  z.looseObject({
    step: z.int().min(0),
    stage: z.string(),
    position: z.int().min(0),
    priority: z.number().min(0),
    episodes: z.array(keptEpisode).min(1),
  }),
);

function unpackGroup<Row>(
  kept: KeptGroup,
  { task, rows, tokenizer }: ReplayStage<Row> & { tokenizer: RolloutTokenizer },
): ReplayedGroup<Row> {
  const row = rows.at(kept.position);
  const prompts = new Map<string, EpisodePrompt>();
  const promptOf = (view: MotivationView) => {
    const key = JSON.stringify(view);
    const prompt = prompts.get(key) ?? episodePrompt(tokenizer, task, row, view);
    prompts.set(key, prompt);
    return prompt;
  };
  const episodes = kept.episodes.map(
    ({ view, turns, ...rest }): Episode => ({
      ...rest,
      prompt: promptOf(view),
      turns: turns.map(unpackTurn),
    }),
  );
  return { row, episodes, replayed: kept.step };
}

function packEpisode({ prompt, turns, ...rest }: Episode): KeptEpisode {
  return { ...rest, view: prompt.view, turns: turns.map(packTurn) };
}

function packTurn(turn: Turn): KeptTurn {
  const tokens = pack(turn.tokens);
  if (turn.role !== 'model') return { ...turn, tokens };
  return { ...turn, tokens, logprobs: pack(turn.logprobs), entropies: pack(turn.entropies) };
}

function unpackTurn(turn: KeptTurn): Turn {
  const tokens = new Int32Array(unpack(turn.tokens));
  if (turn.role !== 'model') return { ...turn, tokens };
  const { logprobs, entropies } = turn;
  return {
    ...turn,
    tokens,
    logprobs: new Float32Array(unpack(logprobs)),
    entropies: new Float32Array(unpack(entropies)),
  };
}

/** The bytes of an array as text, a fraction of what its numbers take in JSON and the same to the last bit. */
function pack({ buffer, byteOffset, byteLength }: Int32Array | Float32Array): string {
  return Buffer.from(buffer, byteOffset, byteLength).toString('base64');
}

function unpack(text: string): ArrayBuffer {
  const bytes = Buffer.from(text, 'base64');
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
}
