/** containerd's filter language, as its `filters` package reads it: a list is OR, a comma inside one filter is AND.
 *
 *     filter    := selector ("," selector)*
 *     selector  := fieldpath [("==" | "!=" | "~=") value]
 *     fieldpath := field ("." field)*
 *     field     := "quoted" | [A-Za-z0-9_]+
 *     value     := "quoted" | [^\s,]+            and for ~= also /quoted/ and |quoted|
 *
 * Quoted text has Go's escapes. White space may stand before a token, not after the last one. Regular expressions are RE2
 * and run in linear time. Errors: InvalidArgument with the byte position, as clients print it.
 *
 * One deliberate difference: an expression that does not compile is refused here; containerd logs it and matches nothing. */
import { RE2JS, RE2JSException } from 're2js';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { SnapshotFilter, SnapshotInfo } from '../worker/worker.ts';

/** Far above what any client sends; a hostile list must not take the process's time. */
const kFilterMaxChars = 64 * 1024;
const kFiltersMax = 1024;

type Matcher = (info: SnapshotInfo) => boolean;

/** No filter at all, and the empty filter, match everything. */
export function parseFilters(filters: readonly string[]): SnapshotFilter {
  if (filters.length === 0) return () => true;
  if (filters.length > kFiltersMax) {
    throw new SnapshotterError(ErrorKind.InvalidArgument, `filters: ${filters.length} given, at most ${kFiltersMax}`);
  }
  const any = filters.map((text) => (text === '' ? () => true : new Parser(text).filter()));
  return (info) => any.some((matches) => matches(info));
}

/** undefined = the field is not present. Only labels look at what follows their first element. */
function fieldOf(info: SnapshotInfo, [first, ...rest]: readonly string[]): string | undefined {
  switch (first) {
    case 'kind':
      return info.kind;
    case 'name':
      return info.name;
    case 'parent':
      return info.parent;
    case 'labels': {
      const key = rest.join('.');
      return Object.hasOwn(info.labels, key) ? info.labels[key] : undefined;
    }
    default:
      return undefined;
  }
}

type Token =
  | {
      readonly kind: 'field' | 'value' | 'quoted' | 'operator' | 'separator';
      readonly at: number;
      readonly text: string;
    }
  | { readonly kind: 'end' | 'other'; readonly at: number; readonly text: string };

const isFieldChar = (char: string): boolean => /^[A-Za-z0-9_]$/.test(char);
const isSpace = (char: string): boolean => /^[\t\n\v\f\r \u0085\p{Z}]$/u.test(char);
/** Letters, marks, numbers, punctuation, symbols: what Go calls graphic, without spaces. */
const isValueChar = (char: string): boolean =>
  char !== ',' && char !== '\ufffd' && /^[\p{L}\p{M}\p{N}\p{P}\p{S}]$/u.test(char);
const isQuote = (char: string): boolean => char === '"' || char === '/' || char === '|';
const isOperatorChar = (char: string): boolean => char === '=' || char === '!' || char === '~';

class Parser {
  readonly #text: string;
  /** By code point: positions inside surrogate pairs do not exist. */
  readonly #chars: readonly string[];
  #next = 0;
  /** After an operator, up to the value: bare text is a value, not a field. */
  #expectsValue = false;

  constructor(text: string) {
    this.#text = text;
    if (text.length > kFilterMaxChars) {
      throw new SnapshotterError(ErrorKind.InvalidArgument, `filter is longer than ${kFilterMaxChars} characters`);
    }
    this.#chars = Array.from(text);
  }

  filter(): Matcher {
    const all = [this.#selector()];
    while (this.#next < this.#chars.length) {
      if (this.#chars[this.#next] !== ',') throw this.#error(this.#next, 'unexpected input');
      this.#scan();
      all.push(this.#selector());
    }
    return (info) => all.every((matches) => matches(info));
  }

  #selector(): Matcher {
    const path = this.#fieldPath();
    const ahead = this.#chars[this.#next];
    if (ahead === undefined || ahead === ',') return (info) => fieldOf(info, path) !== undefined;
    const operator = this.#scan();
    if (operator.kind !== 'operator') throw this.#error(operator.at, 'expected an operator ("==", "!=" or "~=")');
    switch (operator.text) {
      case '==': {
        const value = this.#value(false);
        return (info) => fieldOf(info, path) === value;
      }
      case '!=': {
        // An absent field counts as empty here, as it does for containerd.
        const value = this.#value(false);
        return (info) => (fieldOf(info, path) ?? '') !== value;
      }
      case '~=': {
        const at = this.#next;
        const expression = this.#compile(at, this.#value(true));
        return (info) => expression.matcher(fieldOf(info, path) ?? '').find();
      }
      default:
        throw this.#error(operator.at, `unsupported operator "${operator.text}"`);
    }
  }

  #compile(at: number, pattern: string): RE2JS {
    try {
      return RE2JS.compile(pattern);
    } catch (error) {
      if (!(error instanceof RE2JSException)) throw error;
      throw this.#error(at, `regular expression: ${error.message}`);
    }
  }

  #fieldPath(): readonly string[] {
    const path = [this.#field()];
    while (this.#chars[this.#next] === '.') {
      this.#scan();
      path.push(this.#field());
    }
    return path;
  }

  #field(): string {
    const token = this.#scan();
    if (token.kind === 'field') return token.text;
    if (token.kind === 'quoted') return this.#unquote(token, false);
    throw this.#error(token.at, 'expected a field name');
  }

  #value(regular: boolean): string {
    const token = this.#scan();
    if (token.kind === 'value' || token.kind === 'field') return token.text;
    if (token.kind === 'quoted') return this.#unquote(token, regular);
    throw this.#error(token.at, 'expected a value');
  }

  #unquote(token: Token, regular: boolean): string {
    if (!regular && !token.text.startsWith('"')) {
      throw this.#error(token.at, 'only "…" quotes here; /…/ and |…| belong to ~=');
    }
    const bytes: Buffer[] = [];
    const body = Array.from(token.text).slice(1, -1);
    for (let i = 0; i < body.length; i += 1) {
      const char = body[i] ?? '';
      if (char !== '\\') {
        bytes.push(Buffer.from(char));
        continue;
      }
      i += 1;
      const letter = body[i] ?? '';
      const simple = kSimpleEscapes[letter];
      if (simple !== undefined) {
        bytes.push(Buffer.from(simple));
      } else if (isQuote(letter)) {
        bytes.push(Buffer.from(letter));
      } else {
        // The scanner saw to it that the digits are there. \x and octal give bytes, \u and \U code points.
        const base = kDigitBases[letter] ?? 8;
        const start = base === 8 ? i : i + 1;
        const length = kDigitCounts[letter] ?? 3;
        const value = Number.parseInt(body.slice(start, start + length).join(''), base);
        i = start + length - 1;
        if (letter === 'u' || letter === 'U') {
          if (value > 0x10ffff) throw this.#error(token.at, 'escape is not a Unicode code point');
          bytes.push(Buffer.from(String.fromCodePoint(value).toWellFormed()));
        } else {
          if (value > 0xff) throw this.#error(token.at, 'octal escape is larger than a byte');
          bytes.push(Buffer.from([value]));
        }
      }
    }
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(Buffer.concat(bytes));
    } catch {
      throw this.#error(token.at, 'quoted text is not UTF-8');
    }
  }

  #scan(): Token {
    for (;;) {
      const at = this.#next;
      const char = this.#chars[at];
      if (char === undefined) return { kind: 'end', at, text: '' };
      if (char === '\0' || char === '\ufffd') throw this.#error(at, 'illegal character');
      this.#next += 1;
      if (isQuote(char)) {
        this.#scanQuoted(at, char);
        return this.#token('quoted', at);
      }
      if (char === ',' || char === '.') {
        this.#expectsValue = false;
        return this.#token('separator', at);
      }
      if (isOperatorChar(char)) {
        this.#skipWhile(isOperatorChar);
        this.#expectsValue = true;
        return this.#token('operator', at);
      }
      if (isSpace(char)) continue;
      if (this.#expectsValue) {
        this.#skipWhile(isValueChar);
        this.#expectsValue = false;
        return this.#token('value', at);
      }
      if (!isFieldChar(char)) return this.#token('other', at);
      this.#skipWhile(isFieldChar);
      return this.#token('field', at);
    }
  }

  #token(kind: Token['kind'], at: number): Token {
    return { kind, at, text: this.#chars.slice(at, this.#next).join('') };
  }

  #skipWhile(accepts: (char: string) => boolean): void {
    while (accepts(this.#chars[this.#next] ?? '')) this.#next += 1;
  }

  /** Stands behind the opening quote; ends behind the closing one. */
  #scanQuoted(at: number, quote: string): void {
    for (;;) {
      const char = this.#take(at);
      if (char === quote) return;
      if (char === '\\') this.#scanEscape(at, quote);
    }
  }

  #scanEscape(at: number, quote: string): void {
    const char = this.#take(at);
    if (char === quote || kSimpleEscapes[char] !== undefined) return;
    const base = kDigitBases[char] ?? 8;
    const digits = base === 16 ? /^[0-9a-fA-F]$/ : /^[0-7]$/;
    if (base === 8 && !digits.test(char)) throw this.#error(at, 'illegal escape sequence');
    for (let left = kDigitCounts[char] ?? 2; left > 0; left -= 1) {
      if (!digits.test(this.#take(at))) throw this.#error(at, 'illegal numeric escape sequence');
    }
  }

  #take(at: number): string {
    const char = this.#chars[this.#next];
    if (char === undefined || char === '\n') throw this.#error(at, 'quoted text is not terminated');
    if (char === '\0' || char === '\ufffd') throw this.#error(this.#next, 'illegal character');
    this.#next += 1;
    return char;
  }

  #error(at: number, reason: string): SnapshotterError {
    const bytes = Buffer.byteLength(this.#chars.slice(0, at).join(''));
    const shown = this.#text.length > 256 ? `${this.#text.slice(0, 256)}…` : this.#text;
    return new SnapshotterError(ErrorKind.InvalidArgument, `filter [${shown}]: position ${bytes}: ${reason}`);
  }
}

const kSimpleEscapes: Readonly<Record<string, string>> = {
  a: '\x07',
  b: '\b',
  f: '\f',
  n: '\n',
  r: '\r',
  t: '\t',
  v: '\v',
  '\\': '\\',
};
const kDigitBases: Readonly<Record<string, number>> = { x: 16, u: 16, U: 16 };
/** Digits that follow the letter; an octal escape has its first digit in the letter's place. */
const kDigitCounts: Readonly<Record<string, number>> = { x: 2, u: 4, U: 8 };
