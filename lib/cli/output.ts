import { jsonWithControlsShown, withControlsShown } from '../control-characters.js';

/** Prints text in which what a terminal would obey is written out, whoever wrote it: models, files, their names. */
export function print(text: string): void {
  process.stdout.write(withControlsShown(text));
}

/** Prints to the standard error as `print` does. */
export function printError(text: string): void {
  process.stderr.write(withControlsShown(text));
}

/** Prints a value as JSON that a terminal can show and a program can read. */
export function printJson(value: unknown): void {
  process.stdout.write(`${jsonWithControlsShown(JSON.stringify(value, null, 2))}\n`);
}

/**
 * Prints texts of a model or a prompt one after another: written out, or with `verbatim` byte for byte. What is written out is
 * counted, so that `close` can say that the text was not printed as it is.
 */
export class TextPrinter {
  #changed = 0;

  constructor(private readonly verbatim: boolean) {}

  print(text: string): void {
    const shown = this.verbatim ? text : withControlsShown(text);
    if (shown !== text) this.#changed += 1;
    process.stdout.write(shown);
  }

  close(): void {
    if (this.#changed === 0) return;
    printError('merf: control characters in the text are written out; --verbatim prints them as they are\n');
  }
}
