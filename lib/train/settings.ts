import { z } from 'zod';
import { type LimitSettings, limitSettings } from '../rollout/index.js';
import { setting } from '../settings.js';

const count = z.int().min(1);
const countOrNone = z.int().min(0);
const share = z.number().min(0).max(1);
const positive = z.number().positive();
const coefficient = z.number().min(0);

const optimizer = {
  learningRate: setting(positive.default(1e-5), {
    group: 'Optimizer',
    description: 'the rate that warm-up rises to',
  }),
  schedule: setting(z.enum(['constant', 'linear', 'cosine']).default('constant'), {
    group: 'Optimizer',
    description: 'how the rate falls after warm-up',
  }),
  warmupSteps: setting(countOrNone.default(0), {
    group: 'Optimizer',
    description: 'steps over which the rate rises',
  }),
  decaySteps: setting(count.optional(), {
    group: 'Optimizer',
    description: 'step at which linear or cosine ends (default: the steps of the run)',
  }),
  minLearningRate: setting(coefficient.default(0), {
    group: 'Optimizer',
    description: 'where linear or cosine ends',
  }),
  beta1: setting(share.default(0.9), {
    group: 'Optimizer',
    description: "AdamW's decay of the first moment",
  }),
  beta2: setting(share.default(0.999), {
    group: 'Optimizer',
    description: "AdamW's decay of the second moment",
  }),
  epsilon: setting(positive.default(1e-8), { group: 'Optimizer', description: "AdamW's epsilon" }),
  weightDecay: setting(coefficient.default(0), {
    group: 'Optimizer',
    description: 'decoupled weight decay of matrices',
  }),
  maxGradNorm: setting(coefficient.default(1), {
    group: 'Optimizer',
    description: 'global norm that gradients are clipped to; 0: not clipped',
  }),
};

const run = {
  steps: setting(count.default(100), { group: 'Run', description: 'training steps in all', matters: false }),
  seed: setting(z.int().min(0).max(0x7fffffff).default(0), {
    group: 'Run',
    description: 'seed of the data, its order and every draw',
  }),
  saveEvery: setting(countOrNone.default(50), {
    group: 'Run',
    description: 'steps between checkpoints; 0: at the end only',
    matters: false,
  }),
  keepCheckpoints: setting(count.default(2), {
    group: 'Run',
    description: 'how many of the newest checkpoints stay on disk',
    matters: false,
  }),
  batchTokens: setting(count.optional(), {
    group: 'Run',
    description: 'tokens of one forward and backward pass: less memory, same result to rounding',
    matters: false,
  }),
};

const evaluation = {
  evaluateEvery: setting(countOrNone.default(0), {
    group: 'Evaluation',
    description: 'steps between evaluations, the first before step 1; 0: none',
    matters: false,
  }),
  evaluatePrompts: setting(count.default(64), {
    group: 'Evaluation',
    description: 'held-out prompts',
    matters: false,
  }),
  evaluateSamples: setting(count.default(1), {
    group: 'Evaluation',
    description: 'completions of each prompt',
    matters: false,
  }),
  passAt: setting(z.array(count).min(1).optional(), {
    group: 'Evaluation',
    description: 'the k of pass@k, by the unbiased estimator (default: the powers of 2 up to the samples)',
    matters: false,
  }),
  evaluateMotivations: setting(z.array(z.string()).min(1).default(['none', 'full']), {
    group: 'Evaluation',
    description: 'views of the motivation to evaluate under',
    matters: false,
  }),
  evaluateTemperature: setting(coefficient.default(1), {
    group: 'Evaluation',
    description: 'sampling temperature of evaluations; 0: greedy',
    matters: false,
  }),
};

/** The settings of a GRPO run, with their defaults; keys that do not exist are refused. */
export const grpoSchema = z.strictObject({
  ...run,
  promptsPerStep: setting(count.default(8), { group: 'Rollout', description: 'prompts of a step' }),
  filterOverlongPrompts: setting(z.boolean().default(false), {
    group: 'Rollout',
    description: 'leave out rows whose prompt fills the context, which end a run before it begins otherwise',
  }),
  dynamicSampling: setting(countOrNone.default(0), {
    group: 'Rollout',
    description:
      'rollouts of a step at most: more prompts are drawn until promptsPerStep of them have rewards that differ ' +
      "(DAPO's dynamic sampling); 0 or 1: off",
  }),
  replay: setting(countOrNone.default(0), {
    group: 'Rollout',
    description:
      'how many of the last groups in which few completions were right are kept, to be learned again in the place of ' +
      'groups without a signal; 0: off',
  }),
  replayCorrect: setting(share.default(0.5), {
    group: 'Rollout',
    description: 'share of right completions up to which a group is kept for replay',
  }),
  difficulty: setting(z.enum(['off', 'skip', 'prioritize', 'weight']).default('off'), {
    group: 'Difficulty',
    description:
      "what a prompt's running success rate does: skip passes prompts without a signal over, prioritize draws the ones " +
      'that fail more often, weight gives them more weight',
  }),
  difficultyDecay: setting(z.number().min(0).lt(1).default(0.5), {
    group: 'Difficulty',
    description: 'weight of the visits before in the running success rate; 0: the last visit alone',
  }),
  difficultyExplore: setting(share.default(0.5), {
    group: 'Difficulty',
    description:
      'with skip, the chance of a prompt whose last visit had no signal; its power for every visit more of that kind',
  }),
  difficultyFloor: setting(z.number().min(0.01).max(1).default(0.1), {
    group: 'Difficulty',
    description: 'the least chance of a prompt to be drawn, with skip and prioritize',
  }),
  difficultyFocus: setting(coefficient.default(1), {
    group: 'Difficulty',
    description: "with weight, the power of a prompt's failure rate that its advantages are multiplied by",
  }),
  curriculum: setting(z.string().optional(), {
    group: 'Difficulty',
    description:
      'values of an option of the task that follow each other, by step, such as people=2@0,3@50,2-5@100, or by success, ' +
      'such as people=2,3,2-5 (default: none)',
  }),
  curriculumCorrect: setting(share.default(0.8), {
    group: 'Difficulty',
    description:
      'with a curriculum by success, the share of correct completions that the next value comes with',
  }),
  curriculumWindow: setting(count.default(10), {
    group: 'Difficulty',
    description: 'with a curriculum by success, the steps that this share is taken over',
  }),
  groupSize: setting(z.int().min(2).default(8), { group: 'Rollout', description: 'completions of a prompt' }),
  ...limitSettings('Rollout', true),
  temperature: setting(positive.default(1), { group: 'Rollout', description: 'sampling temperature' }),
  topK: setting(countOrNone.default(0), {
    group: 'Rollout',
    description: 'draw among the k likeliest tokens; 0: off',
  }),
  topP: setting(z.number().positive().max(1).default(1), {
    group: 'Rollout',
    description: 'draw among the likeliest tokens of this total probability; 1: off',
  }),
  minP: setting(share.default(0), {
    group: 'Rollout',
    description: "drop tokens below this share of the likeliest one's probability; 0: off",
  }),
  keepActivations: setting(coefficient.optional(), {
    group: 'Rollout',
    description:
      'GiB that may be taken, beside the memory of gradients, to keep what the first update needs of the rollout, ' +
      'of whose forward pass through as many layers as that holds it then computes attention alone; 0: off ' +
      '(default: 0.5, or less where the device has less than 2 GiB to spare when the run begins)',
    matters: false,
  }),
  motivation: setting(z.string().default('full'), {
    group: 'Motivation',
    description:
      'what the prompt says about the reward: none, full, adverse, partial:COMPONENT, template:FILE, a mix that the ' +
      'completions of a prompt are divided over, such as full/none, a schedule of these such as full@0,none@100, or ' +
      'adaptive: components whose words no longer raise their own score are withdrawn, and come back where they do',
  }),
  adaptiveWindow: setting(z.int().min(2).default(8), {
    group: 'Motivation',
    description:
      "with --motivation adaptive: steps that measure a component's words before anything is decided about them",
  }),
  adaptiveLift: setting(z.number().positive().max(0.5).default(0.05), {
    group: 'Motivation',
    description:
      "with --motivation adaptive: words are withdrawn where they are shown to raise their component's score by less " +
      'than this share of its range, and come back where it is more than twice as much',
  }),
  adaptiveFloor: setting(z.number().positive().max(0.25).default(0.125), {
    group: 'Motivation',
    description:
      'with --motivation adaptive: share of completions, one of each prompt at least, that see all words, whatever is ' +
      'withdrawn, and of those that see none',
  }),
  hintFailed: setting(z.string().optional(), {
    group: 'Motivation',
    description:
      'a view, such as full, under which a prompt is drawn again where no completion of it was correct; they take the ' +
      'place of those that failed (Guide, with --motivation none, --learn-under none and --learn-correction importance)',
  }),
  learnUnder: setting(z.string().default('same'), {
    group: 'Motivation',
    description:
      'under which prompts completions are learned: same (the one that drew them), a view, several joined by "/" ' +
      '(both: same/none), or a schedule of these such as both@0,same@50',
  }),
  learnCorrection: setting(z.enum(['none', 'importance', 'truncated']).default('none'), {
    group: 'Motivation',
    description:
      'how completions are corrected for being learned under a prompt that did not draw them: none (the ratio starts ' +
      "at 1), importance (the ratio between the prompts, clipped by the loss's range), truncated (weighted by that " +
      'ratio up to learnCap)',
  }),
  learnCap: setting(positive.default(2), {
    group: 'Motivation',
    description: 'the most that a truncated importance weight may be',
  }),
  anchor: setting(coefficient.default(0), {
    group: 'Motivation',
    description:
      'coefficient of the k3 KL penalty that holds what the model says under anchorUnder to what it says under ' +
      'anchorTo; 0: off',
  }),
  anchorUnder: setting(z.string().default('full'), {
    group: 'Motivation',
    description: "the view whose prompt's words are held",
  }),
  anchorTo: setting(z.string().default('none'), {
    group: 'Motivation',
    description: 'the view that they are held to',
  }),
  loss: setting(z.enum(['grpo', 'dapo', 'dr_grpo', 'bnpo', 'cispo', 'gspo']).default('dapo'), {
    group: 'Loss',
    description: 'which policy loss',
  }),
  clipLow: setting(coefficient.optional(), {
    group: 'Loss',
    description: 'lower clip range of the importance ratio (default: 0.2; gspo 3e-4)',
  }),
  clipHigh: setting(coefficient.optional(), {
    group: 'Loss',
    description: 'upper clip range of the importance ratio (default: 0.2; gspo 4e-4, cispo 4)',
  }),
  kl: setting(coefficient.default(0), {
    group: 'Loss',
    description: 'coefficient of the k3 KL penalty against the reference (the initial weights); 0: off',
  }),
  klRatio: setting(z.boolean().default(true), {
    group: 'Loss',
    description:
      'multiply the KL penalty by the importance ratio, whose gradient makes it that of the reverse KL divergence ' +
      '(arXiv:2512.02556)',
  }),
  entropy: setting(coefficient.default(0), {
    group: 'Loss',
    description: 'coefficient of the entropy bonus',
  }),
  advantage: setting(z.enum(['group', 'batch', 'leave_one_out']).default('group'), {
    group: 'Loss',
    description: 'what rewards are compared with',
  }),
  scaleAdvantages: setting(z.boolean().optional(), {
    group: 'Loss',
    description: 'divide advantages by the standard deviation of rewards (default: yes, except for dr_grpo)',
  }),
  multiObjectiveAggregation: setting(
    z.enum(['sum_then_normalize', 'normalize_then_sum']).default('sum_then_normalize'),
    {
      group: 'Loss',
      description:
        'whether advantages come of the totals, or of the components, each normalised within its group (GDPO), which ' +
        'leaves advantage and scaleAdvantages aside',
    },
  ),
  clipAdvantages: setting(coefficient.default(0), {
    group: 'Loss',
    description: 'the most that an advantage may be, above or below 0; 0: not clipped',
  }),
  overlongBuffer: setting(countOrNone.default(0), {
    group: 'Loss',
    description:
      "the last so many of a completion's maxTokens cost reward, the more the longer it is (DAPO's soft overlong " +
      'punishment); 0: off',
  }),
  overlongPenalty: setting(coefficient.default(1), {
    group: 'Loss',
    description: 'what a completion of maxTokens is punished with',
  }),
  maskTruncated: setting(z.boolean().default(false), {
    group: 'Loss',
    description: 'leave completions that ran out of tokens out of the loss',
  }),
  updatesPerRollout: setting(count.default(1), {
    group: 'Loss',
    description: 'passes over the completions of a step',
  }),
  miniBatches: setting(count.default(1), {
    group: 'Loss',
    description: 'optimizer updates of one pass; must divide the prompts of a step',
  }),
  ...optimizer,
  ...evaluation,
});

/** The settings of a supervised run, with their defaults; keys that do not exist are refused. */
export const sftSchema = z.strictObject({
  ...run,
  examplesPerStep: setting(count.default(8), { group: 'Data', description: 'examples of one update' }),
  filterOverlongExamples: setting(z.boolean().default(false), {
    group: 'Data',
    description: 'leave out examples longer than the context, which end a run before it begins otherwise',
  }),
  motivation: setting(z.array(z.string()).min(1).default(['none', 'full']), {
    group: 'Motivation',
    description: "what the prompts of a task's own demonstrations say about the reward; the views take turns",
  }),
  ...limitSettings('Evaluation', false),
  ...optimizer,
  ...evaluation,
});

export type EvaluationSettings = Pick<
  SftSettings,
  keyof typeof evaluation | keyof LimitSettings | 'seed' | 'steps'
>;
export type GrpoSettings = z.output<typeof grpoSchema>;
export type GrpoOptions = z.input<typeof grpoSchema>;
export type SftSettings = z.output<typeof sftSchema>;
export type SftOptions = z.input<typeof sftSchema>;
