/** The beginnings of boxes, escaped characters, which open and close nothing, and braces. */
const marks = /\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*\{?|\\.|[{}]/gs;

/**
 * The final answer that a completion names: what is in the last complete `\boxed{…}` or `\fbox{…}`, inside
 * the last `<answer>` … `</answer>` where there are tags; without a box all that is between the tags, or what
 * follows the last `####`, as in GSM8K. Undefined where there is none or it is empty.
 */
export function extractAnswer(text: string): string | undefined {
  const tagged = lastTagged(text);
  if (tagged !== undefined) return lastBoxed(tagged) ?? afterHashes(tagged) ?? (tagged.trim() || undefined);
  return lastBoxed(text) ?? afterHashes(text);
}

/**
 * The contents of the last box whose braces close, trimmed; `\boxed 42` counts up to the next space or `$`.
 */
export function lastBoxed(text: string): string | undefined {
  let last: string | undefined;
  // Where each brace that is still open has its contents; undefined for those that open no box.
  const open: (number | undefined)[] = [];
  for (const match of text.matchAll(marks)) {
    const [mark] = match;
    const end = match.index + mark.length;
    if (mark === '{') open.push(undefined);
    else if (mark === '}') {
      const start = open.pop();
      if (start !== undefined) last = text.slice(start, match.index).trim();
    } else if (mark.length > 2 && mark.endsWith('{')) open.push(end);
    else if (mark.length > 2) {
      const bare = /^[^\s${}\\]+/.exec(text.slice(end, end + 100))?.[0].replace(/[.,;:]$/, '');
      if (bare) last = bare;
    }
  }
  return last || undefined;
}

function lastTagged(text: string): string | undefined {
  const close = text.lastIndexOf('</answer>');
  if (close < 0) return undefined;
  const open = text.lastIndexOf('<answer>', close);
  return open < 0 ? undefined : text.slice(open + '<answer>'.length, close);
}

function afterHashes(text: string): string | undefined {
  const start = text.lastIndexOf('####');
  if (start < 0) return undefined;
  const rest = text.slice(start + '####'.length);
  return rest.split('\n', 1)[0]?.trim() || undefined;
}
