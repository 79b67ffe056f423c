// Invariants: never more than the bound run; order of arrival; a failing task frees its place.
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { Gate } from './gate.ts';

it('runs at most its bound, in the order of arrival, and survives failures', async () => {
  const gate = new Gate(2);
  const order: number[] = [];
  const finish: (() => void)[] = [];
  let running = 0;
  const tasks = Array.from({ length: 7 }, (_, i) =>
    gate.run(async () => {
      order.push(i);
      running += 1;
      assert.ok(running <= 2);
      await new Promise<void>((resolve) => finish.push(resolve));
      running -= 1;
      if (i % 2 === 1) throw new Error(`task ${i}`);
      return i;
    }),
  );
  const settled = Promise.allSettled(tasks);
  for (let ended = 0; ended < tasks.length; ended += 1) {
    assert.equal(gate.waiting, Math.max(0, 5 - ended));
    finish[ended]?.();
    await new Promise((resolve) => setImmediate(resolve));
  }
  assert.deepEqual(
    (await settled).map((result) => result.status === 'fulfilled'),
    [true, false, true, false, true, false, true],
  );
  assert.deepEqual(order, [0, 1, 2, 3, 4, 5, 6]);
  assert.equal(await gate.run(async () => 'free again'), 'free again');
});
