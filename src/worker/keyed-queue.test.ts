/** Invariants: one job at a time per key, in order; different keys side by side up to the limit; a failure stops
 * nothing; `idle` and `quiet` mean what they say. */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { KeyedQueue } from './keyed-queue.ts';

/** Jobs that end when told to. */
class Jobs {
  readonly started: string[] = [];
  readonly #ends = new Map<string, () => void>();
  readonly #waiters = new Map<string, () => void>();

  job(name: string): () => Promise<string> {
    return async () => {
      this.started.push(name);
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#ends.set(name, resolve);
      this.#waiters.get(name)?.();
      await promise;
      return name;
    };
  }

  async end(name: string): Promise<void> {
    if (!this.#ends.has(name)) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#waiters.set(name, resolve);
      await promise;
    }
    this.#ends.get(name)?.();
  }
}

it('runs jobs of one key one after the other and of different keys side by side', async () => {
  const queue = new KeyedQueue();
  const jobs = new Jobs();
  const all = [queue.run('a', jobs.job('a1')), queue.run('a', jobs.job('a2')), queue.run('b', jobs.job('b1'))];
  await jobs.end('b1');
  assert.deepEqual(jobs.started, ['a1', 'b1']);
  await jobs.end('a1');
  await jobs.end('a2');
  assert.deepEqual(await Promise.all(all), ['a1', 'a2', 'b1']);
  assert.equal(queue.size, 0);
});

it('runs no more at a time than it may, first come first served', async () => {
  const queue = new KeyedQueue(2);
  const jobs = new Jobs();
  const all = ['a', 'b', 'c', 'd'].map((key) => queue.run(key, jobs.job(key)));
  await jobs.end('a');
  await jobs.end('c');
  assert.ok(!jobs.started.includes('d') || jobs.started.length === 4);
  await jobs.end('b');
  await jobs.end('d');
  await Promise.all(all);
  assert.deepEqual(jobs.started, ['a', 'b', 'c', 'd']);
});

it('goes on after a failure', async () => {
  const queue = new KeyedQueue(1);
  const failed = queue.run('a', () => Promise.reject(new Error('no')));
  const next = queue.run('a', () => Promise.resolve('yes'));
  await assert.rejects(failed, /no/);
  assert.equal(await next, 'yes');
});

it('is quiet for a key when its line has ended, and idle when all have', async () => {
  const queue = new KeyedQueue();
  const jobs = new Jobs();
  const all = [queue.run('a', jobs.job('a')), queue.run('b', jobs.job('b'))];
  await queue.quiet('none');
  await jobs.end('a');
  await queue.quiet('a');
  assert.equal(queue.size, 1);
  await jobs.end('b');
  await queue.idle();
  assert.equal(queue.size, 0);
  await Promise.all(all);
});
