/**
 * Characters that a terminal obeys instead of showing them, or that reorder what stands beside them: C0 but for the tab and
 * the line feed, DEL, C1, the separators of lines and paragraphs, and the marks of writing direction.
 */
const obeyed = /(?![\t\n])[\p{Cc}\p{Zl}\p{Zp}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu;

/**
 * `text` with such characters written as `\x1b` or `\u202e`, for what a model, a file or its name says: sent to a terminal as
 * they are they could clear the screen, set the clipboard (OSC 52) or make one text look like another.
 */
export function withControlsShown(text: string): string {
  return text.replace(obeyed, (character) => {
    const code = character.charCodeAt(0);
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, '0')}` : unicodeEscape(code);
  });
}

/** JSON text with the same characters in JSON's own way of writing them, so that it still means the same. */
export function jsonWithControlsShown(json: string): string {
  return json.replace(obeyed, (character) => unicodeEscape(character.charCodeAt(0)));
}

function unicodeEscape(code: number): string {
  return `\\u${code.toString(16).padStart(4, '0')}`;
}
