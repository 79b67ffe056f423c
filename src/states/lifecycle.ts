/** The driver: decides by the machine, writes the intent, runs the effect, settles, replies. In that order, durably.
 * Nobody else starts actors. REQUIRES: one run at a time per id (the caller's keyed queue). */
import { createActor, fromPromise, waitFor } from 'xstate';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { DeviceEvent } from './device-machine.ts';
import { deviceMachine } from './device-machine.ts';
import type { DeviceEffects, Journal, LifeRecord, SnapshotEffects } from './effects.ts';
import { type Keyed, type SnapshotEvent, snapshotMachine } from './snapshot-machine.ts';

export interface Outcome {
  readonly state: string;
  /** What stopped the effect, as it was thrown: the machine keeps only its text. null = nothing did. */
  readonly error: unknown;
}

/** One run of one machine, with its effects filled in. */
type Start<Event> = (input: Keyed, record: LifeRecord, event: Event, run: RunEffect) => Promise<Settled>;
interface Settled {
  readonly state: string;
  readonly failure: string | null;
}
/** Wraps each effect: keeps what it throws. */
type RunEffect = <Output>(effect: () => Promise<Output>) => Promise<Output>;

/** The text under which an event's intent is kept. */
const intentOf = (type: string): string => type.toLowerCase();

class Driver<Event extends { readonly type: string }> {
  readonly #journal: Journal;
  readonly #accepts: (state: string, event: Event) => boolean;
  readonly #start: Start<Event>;
  readonly #noun: string;

  constructor(noun: string, journal: Journal, accepts: (state: string, event: Event) => boolean, start: Start<Event>) {
    this.#noun = noun;
    this.#journal = journal;
    this.#accepts = accepts;
    this.#start = start;
  }

  /** Begins or takes up a change and brings it to its end. An intent that a verb wrote in its own transaction is not
   * written again. FailedPrecondition when the machine does not accept the event; an effect's error is in the outcome. */
  async run(id: string, event: Event): Promise<Outcome> {
    const record = this.#journal.read(id);
    if (!this.#accepts(record.state, event)) {
      throw new SnapshotterError(
        ErrorKind.FailedPrecondition,
        `${this.#noun} ${id} is ${record.state}: ${event.type.toLowerCase()} is not possible`,
      );
    }
    if (record.intent === null) this.#journal.intend(id, intentOf(event.type));
    let error: unknown = null;
    const settled = await this.#start({ id }, record, event, async (effect) => {
      try {
        return await effect();
      } catch (thrown) {
        error ??= thrown;
        throw thrown;
      }
    });
    this.#journal.settle(id, settled.state, settled.failure);
    return { state: settled.state, error };
  }
}

const snapshotAt = (state: string, id: string) =>
  snapshotMachine.resolveState({ value: state as 'absent', context: { id, failure: null } });
const deviceAt = (state: string, id: string) =>
  deviceMachine.resolveState({ value: state as 'absent', context: { id, failure: null } });

export const snapshotAccepts = (state: string, event: SnapshotEvent): boolean => snapshotAt(state, '').can(event);
export const deviceAccepts = (state: string, event: DeviceEvent): boolean => deviceAt(state, '').can(event);

/** Refuses what the machine does not accept: the check a verb makes inside its transaction before it writes an intent. */
export function refuseUnless(state: string, event: SnapshotEvent, context: string): void {
  if (snapshotAccepts(state, event)) return;
  throw new SnapshotterError(ErrorKind.FailedPrecondition, `${context}: the snapshot is ${state}`);
}

export class SnapshotLifecycle {
  readonly #journal: Journal;
  readonly #effects: SnapshotEffects;

  constructor(journal: Journal, effects: SnapshotEffects) {
    this.#journal = journal;
    this.#effects = effects;
  }

  run(id: string, event: SnapshotEvent, signal: AbortSignal = neverAborted): Promise<Outcome> {
    const effects = this.#effects;
    return new Driver<SnapshotEvent>('snapshot', this.#journal, snapshotAccepts, async (input, record, sent, run) => {
      const machine = snapshotMachine.provide({
        actors: {
          prepare: fromPromise<void, Keyed>((hole) => run(() => effects.prepare(hole.input.id, signal))),
          discard: fromPromise<void, Keyed>((hole) => run(() => effects.discard(hole.input.id))),
          seal: fromPromise<void, Keyed>((hole) => run(() => effects.seal(hole.input.id))),
          erase: fromPromise<void, Keyed>((hole) => run(() => effects.erase(hole.input.id))),
          inspect: fromPromise((hole: { input: Keyed }) => run(() => effects.inspect(hole.input.id))),
        },
      });
      const actor = createActor(machine, { input, snapshot: snapshotAt(record.state, input.id) }).start();
      actor.send(sent);
      const end = await waitFor(actor, (snapshot) => !snapshot.hasTag('busy'), { timeout: Number.POSITIVE_INFINITY });
      actor.stop();
      return { state: String(end.value), failure: end.context.failure };
    }).run(id, event);
  }
}

export class DeviceLifecycle {
  readonly #journal: Journal;
  readonly #effects: DeviceEffects;

  constructor(journal: Journal, effects: DeviceEffects) {
    this.#journal = journal;
    this.#effects = effects;
  }

  run(id: string, event: DeviceEvent, signal: AbortSignal = neverAborted): Promise<Outcome> {
    const effects = this.#effects;
    return new Driver<DeviceEvent>('device', this.#journal, deviceAccepts, async (input, record, sent, run) => {
      const machine = deviceMachine.provide({
        actors: {
          attach: fromPromise<void, Keyed>((hole) => run(() => effects.attach(hole.input.id, signal))),
          format: fromPromise<void, Keyed>((hole) => run(() => effects.format(hole.input.id))),
          mount: fromPromise<void, Keyed>((hole) => run(() => effects.mount(hole.input.id))),
          unmount: fromPromise<void, Keyed>((hole) => run(() => effects.unmount(hole.input.id))),
          detach: fromPromise<void, Keyed>((hole) => run(() => effects.detach(hole.input.id))),
          sever: fromPromise<void, Keyed>((hole) => run(() => effects.sever(hole.input.id))),
          inspect: fromPromise((hole: { input: Keyed }) => run(() => effects.inspect(hole.input.id))),
        },
      });
      const actor = createActor(machine, { input, snapshot: deviceAt(record.state, input.id) }).start();
      actor.send(sent);
      const end = await waitFor(actor, (snapshot) => !snapshot.hasTag('busy'), { timeout: Number.POSITIVE_INFINITY });
      actor.stop();
      return { state: String(end.value), failure: end.context.failure };
    }).run(id, event);
  }
}

const neverAborted = new AbortController().signal;
