import { drawnTurns, type EpisodeGroup } from './episode.js';

/** What episodes and their rewards come to on average. */
export class EpisodeTally {
  #count = 0;
  #reward = 0;
  #tokens = 0;
  #truncated = 0;
  #entropy = 0;
  #turns = 0;
  #failures = 0;
  readonly #parts: Record<string, number> = {};
  readonly #cases: Record<string, Record<string, number>> = {};

  add(group: EpisodeGroup): void {
    for (const episode of group.episodes) {
      const { reward, end, turns } = episode;
      this.#count += 1;
      this.#reward += reward.total;
      if (end === 'length') this.#truncated += 1;
      if (end === 'failed' || turns.some((turn) => 'failure' in turn)) this.#failures += 1;
      for (const { tokens, entropies } of drawnTurns(episode)) {
        this.#turns += 1;
        this.#tokens += tokens.length;
        for (const entropy of entropies) this.#entropy += entropy;
      }
      for (const [name, part] of Object.entries(reward.parts)) {
        this.#parts[name] = (this.#parts[name] ?? 0) + part.score;
        this.#cases[name] ??= {};
        const cases = this.#cases[name];
        cases[part.case] = (cases[part.case] ?? 0) + 1;
      }
    }
  }

  /** Means over episodes: shares of cases, and tokens, turns and failures of an episode; entropy is that of a token. */
  summary(options: { environment?: boolean } = {}) {
    const share = (sums: Record<string, number>) =>
      Object.fromEntries(Object.entries(sums).map(([name, sum]) => [name, sum / this.#count]));
    return {
      reward: this.#reward / this.#count,
      parts: share(this.#parts),
      cases: Object.fromEntries(Object.entries(this.#cases).map(([name, counts]) => [name, share(counts)])),
      length: this.#tokens / this.#count,
      truncated: this.#truncated / this.#count,
      entropy: this.#tokens > 0 ? this.#entropy / this.#tokens : 0,
      ...(options.environment && {
        turns: this.#turns / this.#count,
        failures: this.#failures / this.#count,
      }),
    };
  }
}
