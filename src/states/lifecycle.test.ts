/** Invariants: the intent is durable before the effect begins, the settled state before the reply; a power cut at any
 * step leaves a record from which RECOVER reaches the truth. Faults of the recording world: an effect that fails, an
 * effect that is held, a cut before or after any step. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import {
  type DeviceEffects,
  DeviceReality,
  type Journal,
  type LifeRecord,
  Reality,
  type SnapshotEffects,
} from './effects.ts';
import { DeviceLifecycle, SnapshotLifecycle } from './lifecycle.ts';

class RecordingWorld implements Journal, SnapshotEffects, DeviceEffects {
  readonly log: string[] = [];
  readonly failing = new Set<string>();
  record: LifeRecord;
  failure: string | null = null;
  /** What is really there. */
  there = false;
  mounted = false;
  stepsLeft = Number.POSITIVE_INFINITY;

  constructor(state = 'absent', intent: string | null = null) {
    this.record = { state, intent };
  }

  #step(text: string): void {
    if (this.stepsLeft <= 0) throw new Error('the power is cut');
    this.stepsLeft -= 1;
    this.log.push(text);
  }

  async #effect<T>(name: string, act: () => T): Promise<T> {
    this.#step(name);
    await Promise.resolve();
    if (this.failing.has(name)) throw new SnapshotterError(ErrorKind.Unavailable, `${name} failed`);
    const result = act();
    this.#step(`${name} done`);
    return result;
  }

  read(): LifeRecord {
    return this.record;
  }
  intend(_id: string, intent: string): void {
    this.#step(`intend ${intent}`);
    this.record = { ...this.record, intent };
  }
  settle(_id: string, state: string, failure: string | null): void {
    this.#step(`settle ${state}`);
    this.record = { state, intent: null };
    this.failure = failure;
  }

  prepare = (): Promise<void> =>
    this.#effect('prepare', () => {
      this.there = true;
    });
  discard = (): Promise<void> =>
    this.#effect('discard', () => {
      this.there = false;
    });
  seal = (): Promise<void> => this.#effect('seal', () => undefined);
  erase = (): Promise<void> =>
    this.#effect('erase', () => {
      this.there = false;
    });
  attach = (): Promise<void> =>
    this.#effect('attach', () => {
      this.there = true;
    });
  format = (): Promise<void> => this.#effect('format', () => undefined);
  mount = (): Promise<void> =>
    this.#effect('mount', () => {
      this.mounted = true;
    });
  unmount = (): Promise<void> =>
    this.#effect('unmount', () => {
      this.mounted = false;
    });
  detach = (): Promise<void> =>
    this.#effect('detach', () => {
      this.there = false;
    });
  sever = (): Promise<void> =>
    this.#effect('sever', () => {
      this.there = false;
    });

  answer: Reality | DeviceReality = Reality.Absent;
  inspect = <T extends Reality & DeviceReality>(): Promise<T> => this.#effect('inspect', () => this.answer as T);
}

describe('the driver', () => {
  it('records the intent before it touches the world', async () => {
    const world = new RecordingWorld();
    const outcome = await new SnapshotLifecycle(world, world).run('k', { type: 'PREPARE' });
    assert.deepEqual(world.log, ['intend prepare', 'prepare', 'prepare done', 'settle active']);
    assert.deepEqual(outcome, { state: 'active', error: null });
  });

  it('does not write an intent again that a verb wrote in its own transaction', async () => {
    const world = new RecordingWorld('active', 'commit');
    await new SnapshotLifecycle(world, world).run('k', { type: 'COMMIT' });
    assert.deepEqual(world.log, ['seal', 'seal done', 'settle committed']);
  });

  it('refuses what the machine does not accept, with nothing written', async () => {
    const world = new RecordingWorld('view');
    await assert.rejects(
      new SnapshotLifecycle(world, world).run('k', { type: 'COMMIT' }),
      (error: unknown) => error instanceof SnapshotterError && error.kind === ErrorKind.FailedPrecondition,
    );
    assert.deepEqual(world.log, []);
  });

  it('undoes a Prepare that failed, and hands back the error itself', async () => {
    const world = new RecordingWorld();
    world.failing.add('prepare');
    const { state, error } = await new SnapshotLifecycle(world, world).run('k', { type: 'PREPARE' });
    assert.deepEqual(world.log, ['intend prepare', 'prepare', 'discard', 'discard done', 'settle absent']);
    assert.equal(state, 'absent');
    assert.ok(error instanceof SnapshotterError && error.kind === ErrorKind.Unavailable);
    assert.equal(world.failure, 'prepare failed');
  });

  it('removes on paper what could not be undone, and keeps the first reason', async () => {
    const world = new RecordingWorld();
    world.failing.add('prepare').add('discard');
    const { state, error } = await new SnapshotLifecycle(world, world).run('k', { type: 'PREPARE' });
    assert.equal(state, 'removed');
    assert.match(String(error), /prepare failed/);
  });

  it('makes a snapshot faulty, not the process, when its seal or its inspection fails', async () => {
    for (const [state, intent, type, effect] of [
      ['active', 'commit', 'COMMIT', 'seal'],
      ['active', 'commit', 'RECOVER', 'inspect'],
    ] as const) {
      const world = new RecordingWorld(state, intent);
      world.failing.add(effect);
      const outcome = await new SnapshotLifecycle(world, world).run('k', { type });
      assert.equal(outcome.state, 'faulty');
      assert.equal(world.failure, `${effect} failed`);
    }
  });

  const realities: readonly (readonly [Reality, string, string])[] = [
    [Reality.Absent, 'absent', ''],
    [Reality.Unanswered, 'absent', 'discard'],
    [Reality.Active, 'active', ''],
    [Reality.View, 'view', ''],
    [Reality.Uncommitted, 'committed', 'seal'],
    [Reality.Committed, 'committed', ''],
    [Reality.Removed, 'absent', 'erase'],
  ];
  for (const [reality, state, effect] of realities) {
    it(`recovers "${reality}" to ${state}${effect === '' ? '' : ` by ${effect}`}`, async () => {
      const world = new RecordingWorld('absent', 'prepare');
      world.answer = reality;
      const outcome = await new SnapshotLifecycle(world, world).run('k', { type: 'RECOVER' });
      assert.equal(outcome.state, state);
      const effects = world.log.filter((line) => line === effect);
      assert.equal(effects.length, effect === '' ? 0 : 1);
    });
  }

  it('takes a device down again whose attach failed half way', async () => {
    const world = new RecordingWorld();
    world.failing.add('attach');
    const outcome = await new DeviceLifecycle(world, world).run('1', { type: 'ATTACH' });
    assert.deepEqual(world.log, ['intend attach', 'attach', 'detach', 'detach done', 'settle absent']);
    assert.match(String(outcome.error), /attach failed/);
  });

  it('leaves a device as it was when a change fails', async () => {
    for (const [state, type, effect] of [
      ['attached', 'FORMAT', 'format'],
      ['attached', 'MOUNT', 'mount'],
      ['mounted', 'UNMOUNT', 'unmount'],
      ['attached', 'DETACH', 'detach'],
      ['mounted', 'SEVER', 'sever'],
    ] as const) {
      const world = new RecordingWorld(state);
      world.failing.add(effect);
      const outcome = await new DeviceLifecycle(world, world).run('1', { type });
      assert.equal(outcome.state, state);
    }
  });
});

describe('after a power cut', () => {
  /** intend, prepare, prepare done, settle: a cut before each, and one behind the last. */
  for (let cut = 0; cut <= 4; cut += 1) {
    it(`at step ${cut} of a Prepare, the record and the world agree again`, async () => {
      const world = new RecordingWorld();
      world.stepsLeft = cut;
      await new SnapshotLifecycle(world, world).run('k', { type: 'PREPARE' }).catch(() => undefined);
      world.stepsLeft = Number.POSITIVE_INFINITY;
      const { state, intent } = world.record;
      if (intent !== null) {
        world.answer = state === 'absent' ? Reality.Unanswered : Reality.Active;
        await new SnapshotLifecycle(world, world).run('k', { type: 'RECOVER' });
      }
      assert.equal(world.record.intent, null);
      assert.equal(world.there, world.record.state === 'active');
      assert.equal(world.record.state, cut === 4 ? 'active' : 'absent');
    });
  }

  for (let cut = 0; cut <= 4; cut += 1) {
    it(`at step ${cut} of an attach, the device is known or not there`, async () => {
      const world = new RecordingWorld();
      world.stepsLeft = cut;
      await new DeviceLifecycle(world, world).run('1', { type: 'ATTACH' }).catch(() => undefined);
      world.stepsLeft = Number.POSITIVE_INFINITY;
      if (world.record.intent !== null) {
        world.answer = world.there ? DeviceReality.Attached : DeviceReality.Absent;
        await new DeviceLifecycle(world, world).run('1', { type: 'RECOVER' });
      }
      assert.equal(world.record.intent, null);
      assert.equal(world.there, world.record.state === 'attached');
    });
  }
});
