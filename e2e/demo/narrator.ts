/** Tells a person what happens: steps with their durations, facts below them. Colour only on a terminal that wants it;
 * without one a step is printed when it is done. */

export interface Screen {
  write(text: string): void;
  readonly isTty: boolean;
  readonly columns: number;
}

const style = { bold: 1, dim: 2, red: 31, green: 32, cyan: 36 } as const;
type Style = keyof typeof style;

export class Narrator {
  readonly #screen: Screen;
  readonly #color: boolean;
  readonly #width: number;
  #lastMs = 0;
  /** Facts told while a step runs; printed below its line. */
  #facts: string[] | null = null;

  constructor(screen: Screen, env: Readonly<Record<string, string | undefined>>) {
    this.#screen = screen;
    const wished = env['NO_COLOR'] === undefined || env['NO_COLOR'] === '';
    this.#color = screen.isTty && wished && env['TERM'] !== 'dumb';
    this.#width = Math.max(60, Math.min(screen.columns, 100));
  }

  heading(text: string, below = ''): void {
    this.#line(`\n${this.#paint('bold', text)}`);
    if (below !== '') this.#line(this.#paint('dim', below));
  }

  line(text: string): void {
    this.#line(text);
  }

  /** A fact about the step that runs, or about the last one. */
  fact(text: string): void {
    this.#fact(this.#paint('dim', text));
  }

  /** A command as a person would type it. */
  command(args: readonly string[]): void {
    this.#fact(`${this.#paint('cyan', '$')} ${this.#paint('dim', args.map(quoted).join(' '))}`);
  }

  /** Runs one step and prints its duration, also when it fails. */
  async step<T>(text: string, work: () => Promise<T>): Promise<T> {
    const started = performance.now();
    if (this.#screen.isTty) this.#screen.write(`  … ${text}`);
    this.#facts = [];
    try {
      const result = await work();
      this.#done('green', '✔', text, started);
      return result;
    } catch (error) {
      this.#done('red', '✘', text, started);
      throw error;
    }
  }

  /** Duration of the last step. */
  get lastMs(): number {
    return this.#lastMs;
  }

  /** First column to the left, the others to the right; the first row is the heading. */
  table(rows: readonly (readonly string[])[]): void {
    const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
    for (const [index, row] of rows.entries()) {
      const cells = row.map((cell, column) =>
        column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0),
      );
      const line = `  ${cells.join('  ')}`;
      this.#line(index === 0 ? this.#paint('dim', line) : line);
    }
  }

  failure(text: string): void {
    this.#line(`\n${this.#paint('red', text)}`);
  }

  #done(color: Style, mark: string, text: string, started: number): void {
    const facts = this.#facts ?? [];
    this.#facts = null;
    this.#lastMs = performance.now() - started;
    const took = duration(this.#lastMs);
    const dots = '.'.repeat(Math.max(2, this.#width - 6 - text.length - took.length));
    if (this.#screen.isTty) this.#screen.write('\r\x1b[2K');
    this.#line(`  ${this.#paint(color, mark)} ${text} ${this.#paint('dim', dots)} ${took}`);
    for (const fact of facts) this.#line(fact);
  }

  #fact(painted: string): void {
    const line = `      ${painted}`;
    if (this.#facts === null) this.#line(line);
    else this.#facts.push(line);
  }

  #line(text: string): void {
    this.#screen.write(`${text}\n`);
  }

  #paint(name: Style, text: string): string {
    return this.#color ? `\x1b[${style[name]}m${text}\x1b[0m` : text;
  }
}

export function duration(ms: number): string {
  return ms < 999.5 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

export function bytes(count: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 || Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit]}`;
}

/** As a shell would need it. */
function quoted(argument: string): string {
  return /^[\w@%+=:,./…-]+$/.test(argument) ? argument : `'${argument.replaceAll("'", "'\\''")}'`;
}
