/** Writes a measured figure into the test's output, for whoever asks how far inside its bound a check passes. */
export function report(what: string, value: number): void {
  process.stderr.write(`measured: ${what}: ${value.toExponential(1)}\n`);
}
