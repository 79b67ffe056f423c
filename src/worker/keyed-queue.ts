/** One line per key: jobs of the same key run one after the other, jobs of different keys side by side, at most
 * `runningMax` at a time. A failing job does not stop its line. */
export class KeyedQueue {
  readonly #runningMax: number;
  readonly #lines = new Map<string, Promise<void>>();
  readonly #waiting: (() => void)[] = [];
  #running = 0;

  constructor(runningMax: number = Number.POSITIVE_INFINITY) {
    this.#runningMax = runningMax;
  }

  /** Jobs that have not ended. */
  get size(): number {
    return this.#lines.size;
  }

  async run<T>(key: string, job: () => Promise<T>): Promise<T> {
    const before = this.#lines.get(key) ?? Promise.resolve();
    const result = before.then(() => this.#inTurn(job));
    const end = result.then(nothing, nothing);
    this.#lines.set(key, end);
    try {
      return await result;
    } finally {
      if (this.#lines.get(key) === end) this.#lines.delete(key);
    }
  }

  /** Resolves when the jobs queued for the key until now have ended. */
  async quiet(key: string): Promise<void> {
    await this.#lines.get(key);
  }

  /** Resolves when nothing is queued. */
  async idle(): Promise<void> {
    while (this.#lines.size > 0) await Promise.all(this.#lines.values());
  }

  async #inTurn<T>(job: () => Promise<T>): Promise<T> {
    // A freed place is handed over, not given back: `#running` does not fall while somebody waits.
    if (this.#running >= this.#runningMax) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#running += 1;
    try {
      return await job();
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#running -= 1;
      else next();
    }
  }
}

const nothing = (): void => undefined;
