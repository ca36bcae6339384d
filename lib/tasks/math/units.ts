import { normalizeWords } from './latex.js';

/** Units by the signs of currencies. */
export const currencies: Readonly<Record<string, string>> = {
  $: 'dollar',
  '¢': 'cent',
  '£': 'pound',
  '€': 'euro',
  '¥': 'yen',
};

const unitSynonyms: Readonly<Record<string, string>> = {
  centimeter: 'cm',
  centimetre: 'cm',
  millimeter: 'mm',
  millimetre: 'mm',
  meter: 'm',
  metre: 'm',
  kilometer: 'km',
  kilometre: 'km',
  inche: 'inch',
  in: 'inch',
  foot: 'ft',
  feet: 'ft',
  yd: 'yard',
  mi: 'mile',
  gram: 'g',
  kilogram: 'kg',
  lb: 'pound',
  hr: 'hour',
  h: 'hour',
  min: 'minute',
  sec: 'second',
  s: 'second',
  usd: 'dollar',
  buck: 'dollar',
  deg: 'degree',
  pct: 'percent',
  percentage: 'percent',
  liter: 'l',
  litre: 'l',
  mph: 'mile per hour',
};

/** A unit in one spelling: singular, abbreviated, with powers as `cm^2`. */
export function canonicalUnit(unit: string): string {
  const words = normalizeWords(unit.replaceAll('/', ' per ')).split(' ');
  const result: string[] = [];
  let power = '';
  for (const word of words) {
    const [, name = '', exponent = ''] = /^(.*?)(\^\d+)?$/.exec(word) ?? [];
    if (name === 'square' || name === 'sq') power = '^2';
    else if (name === 'cubic' || name === 'cu') power = '^3';
    else if (name !== '' && name !== 'of') {
      const singular = name.length > 2 ? name.replace(/(?<!s)s$/, '') : name;
      const known = Object.hasOwn(unitSynonyms, singular) ? unitSynonyms[singular] : singular;
      result.push(`${known}${exponent || power}`);
      power = '';
    } else if (exponent !== '' && result.length > 0) result.push(`${result.pop()}${exponent}`);
  }
  if (power !== '') result.push(`unit${power}`);
  return result.join(' ');
}
