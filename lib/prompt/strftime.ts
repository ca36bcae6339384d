const days = ['Sunday', 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'];
const months = [
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
];
const dayMilliseconds = 86_400_000;

/** A field of a date: text, or a number with the width and the filling that it has without a flag. */
type Part = string | { number: number; width: number; fill: '0' | ' ' };

/**
 * Writes a local date as Python's `datetime.strftime` does for a date without a time zone, in the C locale
 * and with the flags `-`, `_`, `0`, `^` and `#` of the GNU C library. Templates are written for Python, so
 * names of days and months are English whatever the locale of this process is.
 *
 * @throws Error naming the directive where there is no such one
 */
export function strftime(date: Date, format: string): string {
  return format.replace(
    /%([-_0^#]*)([EO]?)([\s\S]?)/gu,
    (whole, flags: string, modifier: string, letter: string) => {
      const modified = modifier === '' || (modifier === 'E' ? 'cCxXyY' : 'deHImMSuUVwWy').includes(letter);
      const part = letter === '' || !modified ? undefined : partOf(date, letter);
      if (part === undefined) throw new Error(`strftime_now knows no directive ${whole}`);
      return written(part, flags, letter);
    },
  );
}

function written(part: Part, flags: string, letter: string): string {
  let text: string;
  if (typeof part === 'string') text = part;
  else {
    const pad = [...flags].findLast((flag) => '-_0'.includes(flag)) ?? part.fill;
    text =
      pad === '-' ? String(part.number) : String(part.number).padStart(part.width, pad === '0' ? '0' : ' ');
  }
  if (flags.includes('^') && letter !== 'P') return text.toUpperCase();
  if (!flags.includes('#')) return text;
  return letter === 'p' ? text.toLowerCase() : 'aAbBh'.includes(letter) ? text.toUpperCase() : text;
}

function partOf(date: Date, letter: string): Part | undefined {
  const padded = (number: number, width = 2, fill: '0' | ' ' = '0'): Part => ({ number, width, fill });
  const hour12 = date.getHours() % 12 || 12;
  const year = date.getFullYear();
  const weekday = date.getDay();
  const nameOfDay = days[weekday] as string;
  const nameOfMonth = months[date.getMonth()] as string;
  switch (letter) {
    case 'a':
      return nameOfDay.slice(0, 3);
    case 'A':
      return nameOfDay;
    case 'b':
    case 'h':
      return nameOfMonth.slice(0, 3);
    case 'B':
      return nameOfMonth;
    case 'c':
      return strftime(date, '%a %b %e %H:%M:%S %Y');
    case 'C':
      return padded(Math.floor(year / 100));
    case 'd':
      return padded(date.getDate());
    case 'D':
    case 'x':
      return strftime(date, '%m/%d/%y');
    case 'e':
      return padded(date.getDate(), 2, ' ');
    case 'f':
      return String(date.getMilliseconds() * 1000).padStart(6, '0');
    case 'F':
      return strftime(date, '%Y-%m-%d');
    case 'g':
      return padded(isoWeek(date).year % 100);
    case 'G':
      return padded(isoWeek(date).year, 1);
    case 'H':
      return padded(date.getHours());
    case 'I':
      return padded(hour12);
    case 'j':
      return padded(dayOfYear(date), 3);
    case 'k':
      return padded(date.getHours(), 2, ' ');
    case 'l':
      return padded(hour12, 2, ' ');
    case 'm':
      return padded(date.getMonth() + 1);
    case 'M':
      return padded(date.getMinutes());
    case 'n':
      return '\n';
    case 'p':
      return date.getHours() < 12 ? 'AM' : 'PM';
    case 'P':
      return date.getHours() < 12 ? 'am' : 'pm';
    case 'r':
      return strftime(date, '%I:%M:%S %p');
    case 'R':
      return strftime(date, '%H:%M');
    case 's':
      return padded(Math.floor(date.getTime() / 1000), 1);
    case 'S':
      return padded(date.getSeconds());
    case 't':
      return '\t';
    case 'T':
    case 'X':
      return strftime(date, '%H:%M:%S');
    case 'u':
      return padded(weekday || 7, 1);
    case 'U':
      return padded(Math.floor((dayOfYear(date) + 6 - weekday) / 7));
    case 'V':
      return padded(isoWeek(date).week);
    case 'w':
      return padded(weekday, 1);
    case 'W':
      return padded(Math.floor((dayOfYear(date) + 6 - ((weekday + 6) % 7)) / 7));
    case 'y':
      return padded(year % 100);
    case 'Y':
      return padded(year, 1);
    // A date without a time zone has neither an offset nor a name of one.
    case 'z':
    case 'Z':
      return '';
    case '%':
      return '%';
    default:
      return undefined;
  }
}

/** 1 for the first of January. Days are counted in UTC, which has no daylight saving. */
function dayOfYear(date: Date): number {
  const day = Date.UTC(date.getFullYear(), date.getMonth(), date.getDate());
  return (day - Date.UTC(date.getFullYear(), 0, 1)) / dayMilliseconds + 1;
}

/** The ISO 8601 week: it belongs to the year that its Thursday lies in. */
function isoWeek(date: Date): { year: number; week: number } {
  const thursday = new Date(date.getFullYear(), date.getMonth(), date.getDate() + 4 - (date.getDay() || 7));
  return { year: thursday.getFullYear(), week: Math.floor((dayOfYear(thursday) - 1) / 7) + 1 };
}
