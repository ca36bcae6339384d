import { describe, expect, test } from '@jest/globals';
import { areEquivalent, extractAnswer } from 'merf';

type Table = readonly (readonly [answer: string, reference: string])[];

/** Answers that say the same as their reference, and the other way round; by kind. */
const equal: Readonly<Record<string, Table>> = {
  integers: [
    ['42', '42.0'],
    ['42.', '42'],
    ['+42', '42'],
    ['−5', '-5'],
    ['$42$', '42'],
    ['\\(42\\)', '42'],
    ['720', '6!'],
    ['1024', '2^{10}'],
    ['2^10', '1024'],
    ['10^{100}+1-1', '10^{100}'],
    ['\\textbf{42}', '42'],
  ],
  'thousands separators': [
    ['1,234', '1234'],
    ['1{,}234', '1234'],
    ['10,\\!080', '10080'],
    ['11,\\! 111,\\! 111,\\! 100', '11111111100'],
    ['58,500', '58500'],
    ['10 000', '10000'],
    ['1, 234', '1,234'],
  ],
  'decimals and fractions': [
    ['\\frac{1}{2}', '0.5'],
    ['\\frac12', '1/2'],
    ['½', '0.5'],
    ['\\dfrac{17}{50}', '.34'],
    ['\\frac 59', '\\frac{5}{9}'],
    ['\\frac9{19}', '9/19'],
    ['-\\frac{3}{4}', '\\frac{-3}{4}'],
    ['0.\\overline{3}', '1/3'],
    ['0.1\\overline{6}', '1/6'],
    ['0.12345678901234567890', '\\frac{12345678901234567890}{100000000000000000000}'],
    ['\\frac{1}{1+\\frac{1}{2}}', '\\frac23'],
  ],
  'mixed numbers': [
    ['1\\frac{4}{5}', '\\frac95'],
    ['1 4/5', '9/5'],
    ['137 \\frac{1}{2}', '137.5'],
    ['-1\\frac12', '-1.5'],
  ],
  percentages: [
    ['50\\%', '50'],
    ['50\\%', '0.5'],
    ['\\frac12', '50\\%'],
    ['50 percent', '50\\%'],
  ],
  'units and currency': [
    ['864', '864 \\mbox{ inches}^2'],
    ['15\\mbox{ cm}^2', '15 \\text{ square centimeters}'],
    ['12 square feet', '12\\text{ ft}^2'],
    ['5.4 \\text{ cents}', '5.4'],
    ['\\$18.90', '18.9'],
    ['\\$32,\\!348', '32348'],
    ['36 dollars', '\\$36'],
    ['42 apples', '42'],
    ['12\\,\\mathrm{cm}', '12'],
    ['60\\text{ km/h}', '60 \\text{ km per hour}'],
  ],
  degrees: [
    ['90^\\circ', '90'],
    ['90°', '90^{\\circ}'],
    ['\\frac{270}7\\text{ degrees}', '\\frac{270}{7}'],
  ],
  'scientific notation': [
    ['6.72 \\times 10^{-5}', '.0000672'],
    ['1.5e3', '1500'],
    ['1.5 \\cdot 10^3', '1,500'],
  ],
  'multiple choice': [
    ['C', '\\text{(C)}'],
    ['(C)', '\\text{C}'],
    ['\\textbf{(C)}', '(C)'],
    ['C. 12', '\\text{(C)}'],
    ['(C) 12', '(C)'],
    ['C)', 'C'],
  ],
  text: [
    ['east', '\\text{east}'],
    ['East', '\\text{east}'],
    ['\\text{Evelyn}', 'Evelyn'],
    ['\\mathrm{odd}', '\\text{odd}'],
    ['the ellipse', '\\text{ellipse}'],
    ['10:30 \\text{ a.m.}', '10:30 am'],
  ],
  'lists and sets': [
    ['1,-2', '-2, 1'],
    ['1 \\text{ and } 2', '2,1'],
    ['x=1 \\text{ or } x=2', '2, 1'],
    ['x=1,2', '1,2'],
    ['\\{1,2\\}', '\\{2,1\\}'],
    ['\\{1,1,2\\}', '\\{2,1\\}'],
    ['1,2', '\\{2,1\\}'],
    ['5', '\\{5\\}'],
    ['\\emptyset', '\\{\\}'],
    ['x_1=2, x_2=3', 'x_2=3,x_1=2'],
  ],
  '±': [
    ['1 \\pm \\sqrt{19}', '1-\\sqrt{19}, 1+\\sqrt{19}'],
    ['\\{1\\pm\\sqrt{5},-2\\}', '\\{-2,1-\\sqrt5,1+\\sqrt{5}\\}'],
    ['x = \\pm 2', '2, -2'],
    ['2 \\mp 1', '2 \\pm 1'],
  ],
  'tuples and matrices': [
    ['(8,-2)', '\\left( 8, -2 \\right)'],
    ['\\left( 3, \\frac{\\pi}{2} \\right)', '(3,\\pi/2)'],
    ['\\langle 1,2\\rangle', '(1,2)'],
    ['[1,2,3]', '(1,2,3)'],
    ['(x,y)=(1,2)', '(1,2)'],
    [
      '\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}',
      '\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\end{bmatrix}',
    ],
    ['\\begin{pmatrix}1\\\\2\\end{pmatrix}', '(1,2)'],
    ['\\begin{array}{cc}1&2\\\\3&4\\end{array}', '\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}'],
  ],
  intervals: [
    ['\\left(\\frac{3}{5},\\frac{8}{3}\\right]', '(0.6,8/3]'],
    ['(9,36)\\cup(0,9)', '(0,9) \\cup (9,36)'],
    ['x \\in [-2,7]', '[-2,7]'],
    ['-2 \\le x \\le 7', '[-2,7]'],
    ['x>2', '(2,\\infty)'],
    ['x<2 \\text{ or } x>3', '(-\\infty, 2) \\cup (3, \\infty)'],
    ['\\{x : x \\ge 2\\}', '[2,\\infty)'],
    ['\\mathbb{R}', '(-\\infty,\\infty)'],
  ],
  'equations and inequalities': [
    ['x=5', '5'],
    ['5', 'x=5'],
    ['2x+3', 'y = 2x + 3'],
    ['f(x)=2x', '2x'],
    ['2x-y+3=0', 'y = 2x + 3'],
    ['7y-5x-11z=4', '5x - 7y + 11z + 4 = 0'],
    ['4 - x^2 - y^2 = 0', 'x^2+y^2=4'],
    ['2<x', 'x>2'],
    ['2x>4', 'x>2'],
    ['x+y\\le 3', '3 \\ge y+x'],
  ],
  expressions: [
    ['2(k+1)', '2k+2'],
    ['ab+2a+5b+10', '(a+5)(b+2)'],
    ['\\frac{9a}{20}+\\frac{11}{20}', '\\frac{11+9a}{20}'],
    ['3x/4', '\\frac{3}{4}x'],
    ['3yx^2', '3x^2y'],
    ['x+1', '\\frac{x^2-1}{x-1}'],
    ['1+\\frac{1}{x}', '\\frac{x+1}{x}'],
    ['n \\cdot (n-1)!', 'n!'],
    ['\\sqrt{x^2}', '|x|'],
    ['2\\ln x', '\\ln x^2'],
    ['\\sqrt{xy}', '\\sqrt{x}\\sqrt{y}'],
    ['b x_2+a x_1', 'ax_1+bx_2'],
    ['\\frac{n(n+1)}{2}', '\\binom{n+1}{2}'],
  ],
  'roots, logarithms and constants': [
    ['\\sqrt{12}', '2\\sqrt3'],
    ['sqrt(12)', '2*sqrt(3)'],
    ['\\frac{1}{\\sqrt3}', '\\frac{\\sqrt{3}}{3}'],
    ['\\sqrt{5+2\\sqrt6}', '\\sqrt{2}+\\sqrt3'],
    ['\\sqrt[3]{-8}', '-2'],
    ['\\sqrt{x}', 'x^{1/2}'],
    ['20000/\\pi', '\\frac{20000}{\\pi}'],
    ['\\pi*2', '2\\pi'],
    ['3', '\\log_2 8'],
    ['\\ln 6', '\\ln 2+\\ln 3'],
    ['15', '\\sum_{k=1}^{5} k'],
  ],
  trigonometry: [
    ['\\frac{\\cos x}{\\sin x}', '\\cot x'],
    ['1', '\\sin^2 x+\\cos^2 x'],
    ['\\sin 30^\\circ', '1/2'],
    ['\\tan^{-1}(1)', '\\frac{\\pi}{4}'],
    ['2\\sin x\\cos x', '\\sin 2x'],
  ],
  'complex numbers': [
    ['-5i+6', '6-5i'],
    ['\\frac{1-i}{2}', '\\frac{1}{1+i}'],
    ['-1', 'e^{i\\pi}'],
    ['2i', '\\sqrt{-4}'],
  ],
  'what models write': [
    ['3, 5, \\text{ and } 7', '3, 5, 7'],
    ['\\text{The answer is } 42', '42'],
    ['**42**', '42'],
    ['\\sqrt{5} \\approx 2.236', '\\sqrt{5}'],
    ['x=\\sqrt{5}\\approx 2.236', '\\sqrt{5}'],
    ['x \\approx 2.236', '2.236'],
    ['m\\angle A = 76^\\circ', '76^\\circ'],
    ['38\\frac{4}{7}^\\circ', '\\frac{270}7\\text{ degrees}'],
    ['\\textbf{(B)}\\ 12', '\\text{(B)}'],
    ['864 \\, \\text{in}^2', '864 \\mbox{ inches}^2'],
    ['(-\\infty,2)\\cup(3,+\\infty)', '(-\\infty, 2) \\cup (3, \\infty)'],
    [
      '\\begin{pmatrix}\n-1 & 0\\\\[2pt]\n0 & -1\\\\\n\\end{pmatrix}',
      '\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}',
    ],
    ['-2, 1 \\pm \\sqrt{5}', '\\{1\\pm\\sqrt{5},-2\\}'],
    ['\\left(\\frac{1}{2}\\right)^n', '2^{-n}'],
    ['\\cot(x)', '\\cot{x}'],
    ['6 - 5\\mathrm{i}', '6-5i'],
    ['\\dfrac{\\dfrac{1}{2}}{3}', '1/6'],
    ['6.02×10^23', '6.02 \\times 10^{23}'],
  ],
  bases: [
    ['52_{\\text{eight}}', '52_8'],
    ['52_{8}', '52_8'],
    ['52', '52_8'],
    ['21_8', '17_{10}'],
  ],
};

/** Near misses. */
const unequal: Readonly<Record<string, Table>> = {
  numbers: [
    ['43', '42'],
    ['-5', '5'],
    ['0.3333', '1/3'],
    ['0.333333333333333333', '1/3'],
    ['3.14', '\\pi'],
    ['22/7', '\\pi'],
    ['1.41421356237309504880', '\\sqrt2'],
    ['2^{100}+1', '2^{100}'],
    ['10000000000000000000000000000000001\\sqrt2', '10000000000000000000000000000000000\\sqrt2'],
    ['10^{-40}\\sqrt2', '10^{-50}\\sqrt3'],
    ['262537412640768744', 'e^{\\pi\\sqrt{163}}'],
    ['1/0', '1/0+1'],
    ['\\sqrt13', '\\sqrt3'],
  ],
  'percentages and units': [
    ['5', '50\\%'],
    ['0.5\\%', '0.5'],
    ['5 \\text{ cm}', '5 \\text{ m}'],
    ['5\\text{ cm}^2', '5\\text{ cm}^3'],
    ['\\$5', '5\\text{ cents}'],
  ],
  collections: [
    ['(2,1)', '(1,2)'],
    ['[1,2]', '(1,2)'],
    ['[1,2)', '[1,2]'],
    ['(1,2)', '\\{1,2\\}'],
    ['1,2', '1,2,3'],
    ['1,1,2', '1,2,2'],
    ['1,3', '1,2'],
    ['1+\\sqrt{19}', '1 \\pm \\sqrt{19}'],
    ['\\begin{pmatrix}1&2\\end{pmatrix}', '\\begin{pmatrix}1\\\\2\\end{pmatrix}'],
    ['(0,9) \\cup (9,35)', '(0,9) \\cup (9,36)'],
    ['(-\\infty,2)', '(2,\\infty)'],
  ],
  relations: [
    ['y=5', 'x=5'],
    ['y=3x', 'y=2x'],
    ['y=2x', 'x=2y'],
    ['x<2', 'x>2'],
    ['x>2', 'x\\ge2'],
    ['x<2', '2x>4'],
    ['y>2', 'x>2'],
  ],
  expressions: [
    ['x+2', 'x+1'],
    ['x', '\\sqrt{x^2}'],
    ['y', 'x'],
    ['A', 'a'],
    ['x^e', 'e^x'],
    ['\\cos x', '\\sin x'],
    ['6+5i', '6-5i'],
    ['(x-1)(x-2)(x-3)(x-4)(x-5)', '0'],
    ['52_7', '52_8'],
    ['x^{-1}', '-x'],
  ],
  'words and letters': [
    ['\\text{west}', '\\text{east}'],
    ['seat', 'east'],
    ['no solution', '0'],
    ['A', '\\text{(C)}'],
    ['12', '\\text{(C)}'],
    ['', '5'],
    ['\\text{}', '5'],
  ],
};

describe('areEquivalent', () => {
  for (const [kind, table] of Object.entries(equal)) {
    test.each(table)(`${kind}: %s says the same as %s`, async (answer, reference) => {
      expect(await areEquivalent(answer, reference)).toBe(true);
      expect(await areEquivalent(reference, answer)).toBe(true);
    });
  }

  for (const [kind, table] of Object.entries(unequal)) {
    test.each(table)(`${kind}: %s is not %s`, async (answer, reference) => {
      expect(await areEquivalent(answer, reference)).toBe(false);
      expect(await areEquivalent(reference, answer)).toBe(false);
    });
  }

  test.each(['constructor', 'toString', 'hasOwnProperty', '__proto__', 'x + constructor', '2 valueOf'])(
    'reads the name of a property of every object as a word: %s',
    async (answer) => {
      await expect(areEquivalent(answer, answer)).resolves.toBe(true);
      await expect(areEquivalent(answer, '7')).resolves.toBe(false);
      await expect(areEquivalent('0.5constructor', '(1, 2)')).resolves.toBe(false);
    },
  );

  test('takes the last side of an equation for a value, and no value for an equation', async () => {
    expect(await areEquivalent('m+n=113', '113')).toBe(true);
    expect(await areEquivalent('2+3=5', '5')).toBe(true);
    expect(await areEquivalent('m+n=113', 'm+n')).toBe(false);
    expect(await areEquivalent('3', '5x - 7y = 3')).toBe(false);
  });

  test('takes rounded constants where a tolerance is given', async () => {
    expect(await areEquivalent('0.3333', '1/3')).toBe(false);
    expect(await areEquivalent('0.3333', '1/3', { tolerance: 1e-3 })).toBe(true);
    expect(await areEquivalent('0.33', '1/3', { tolerance: 1e-3 })).toBe(false);
    expect(await areEquivalent('1.4142', '\\sqrt{2}', { tolerance: 1e-4 })).toBe(true);
  });
});

const nine = '9'.repeat(1800);

/** Answers that would take very long, run code, or overflow the stack of a careless reader. */
const hostile: readonly (readonly [name: string, answer: string])[] = [
  ['a tower without braces', '9^9^9'],
  ['a tower', '9^{9^{9^{9}}}'],
  ['10,000 open braces', '{'.repeat(10_000)],
  ['5,000 pairs of braces', `${'{'.repeat(5000)}5${'}'.repeat(5000)}`],
  ['900 pairs of parentheses', `${'('.repeat(900)}x${')'.repeat(900)}`],
  ['many factors', '(x+1)'.repeat(110)],
  ['nested fractions', `${'\\frac{1}{1+'.repeat(22)}x${'}'.repeat(22)}`],
  ['nested roots', `${'\\sqrt{'.repeat(100)}2${'}'.repeat(100)}`],
  ['a megabyte of digits', '1'.repeat(1_000_000)],
  ['a large factorial', '100000!'],
  ['factorials of factorials', '((1000!)!)!'],
  ['a large power of a decimal', '1.0000001^{123456}'],
  ['exponentials of exponentials', 'e^{e^{e^{e^{10}}}}'],
  ['the sine of a large number', '\\sin(10^{100})'],
  ['a sum of sums of sums', '\\sum_{k=1}^{1000}\\sum_{j=1}^{1000}\\sum_{i=1}^{1000} k'],
  ['a long sum of factorials', '\\sum_{k=1}^{1000} k!'],
  ['a logarithm of a large number', '\\log_{2}(3^{50000})'],
  ['the root of many digits', `\\sqrt{${nine}}`],
  ['599 signs', `${'-'.repeat(599)}1`],
  ['many ±', `${'\\pm'.repeat(500)}1`],
  ['many bars', '|'.repeat(500)],
  ['many words', `12 ${'ab '.repeat(600)}1`],
  ['white space within', `1${' '.repeat(1500)}1`],
  ['code', 'process.exit(1)'],
  ['a constructor', 'constructor'],
  ['a prototype', '__proto__'],
  ['open matrices', '\\begin{pmatrix}'.repeat(100)],
  ['open texts', '\\text{'.repeat(300)],
  ['a backslash at the end', '5\\'],
  ['a lonely caret', '^'],
  ['an unpaired surrogate', '\ud800'],
];

describe('hostile answers', () => {
  test.each(hostile)('%s', async (_, answer) => {
    await areEquivalent('x+1', '1+x'); // The parser's start is not what is measured.
    const start = performance.now();
    expect(await areEquivalent(answer, '3x+5')).toBe(false);
    expect(await areEquivalent('3x+5', answer)).toBe(false);
    // The work of one comparison is limited to about 0.3 s; this leaves room for a slow machine.
    expect(performance.now() - start).toBeLessThan(5000);
  });
});

describe('extractAnswer', () => {
  test.each<[text: string, answer: string | undefined]>([
    ['so \\boxed{42}.', '42'],
    ['\\boxed{1} then \\boxed{2}', '2'],
    ['\\boxed{\\frac{1}{\\sqrt{2}}}', '\\frac{1}{\\sqrt{2}}'],
    ['\\boxed{\\{1, 2\\}}', '\\{1, 2\\}'],
    ['\\boxed{\\text{a } b}', '\\text{a } b'],
    ['\\fbox{7}', '7'],
    ['\\boxed { 5 }', '5'],
    ['$\\boxed 5$', '5'],
    ['\\boxed{\\boxed{3}}', '\\boxed{3}'],
    ['\\boxed{42', undefined],
    ['\\boxed{1} and \\boxed{2', '1'],
    ['\\boxed{\\boxed{3}', '3'],
    ['\\boxed{}', undefined],
    ['\\boxedness{3}', undefined],
    ['<answer>\\boxed{3}</answer> not \\boxed{4}', '3'],
    ['<answer> 3/4 </answer>', '3/4'],
    ['<answer>#### 9</answer>', '9'],
    ['<answer></answer>', undefined],
    ['<answer>1</answer> <answer>2</answer>', '2'],
    ['worked out\n#### 1,234\n', '1,234'],
    ['#### 3\n#### 4', '4'],
    ['42', undefined],
    ['', undefined],
  ])('%j gives %j', (text, answer) => {
    expect(extractAnswer(text)).toBe(answer);
  });

  test.each([
    ['\\boxed{'.repeat(150_000)],
    ['\\boxed{1}'.repeat(100_000)],
    ['{'.repeat(1_000_000)],
    [`\\boxed${' '.repeat(1_000_000)}`],
    ['<answer>'.repeat(100_000)],
    ['#### '.repeat(200_000)],
  ])('long text is read in linear time (%#)', (text) => {
    const start = performance.now();
    extractAnswer(text);
    expect(performance.now() - start).toBeLessThan(3000);
  });
});
