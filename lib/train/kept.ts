/** Something that a trainer keeps from one step to the next beside the policy, as JSON. */
export interface Kept {
  save(): unknown;
  /** Takes what `save` gave. @throws Error where it is something else, and nothing has changed then */
  load(state: unknown): void;
}

/** All that a trainer keeps as one, each under its name; undefined where there is none of it. */
export function keptTogether(parts: Readonly<Record<string, Kept | undefined>>): Kept | undefined {
  const present = Object.entries(parts).filter((entry): entry is [string, Kept] => entry[1] !== undefined);
  if (present.length === 0) return undefined;
  return {
    save: () => Object.fromEntries(present.map(([name, part]) => [name, part.save()])),
    load(state) {
      const saved = state as Record<string, unknown>;
      for (const [name, part] of present) if (name in saved) part.load(saved[name]);
    },
  };
}
