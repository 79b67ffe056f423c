/** Life of one snapshot. Names its effects; performs none. COMMIT and REMOVE are settled on paper by the verb; the work
 * behind them follows as busy states. The drawing and the table are generated: README.md, docs/states/snapshot.svg. */
import { assign, fromPromise, setup } from 'xstate';
import { Reality } from './effects.ts';

export interface Keyed {
  readonly id: string;
}

interface Context extends Keyed {
  readonly failure: string | null;
}

export const snapshotEvents = ['PREPARE', 'VIEW', 'COMMIT', 'REMOVE', 'ERASE', 'RECOVER'] as const;
export type SnapshotEvent = { readonly type: (typeof snapshotEvents)[number] };

/** A hole in the machine: `provide` fills it; running it unfilled is a bug. */
const hole = <Output>(name: string) =>
  fromPromise<Output, Keyed>(() => Promise.reject(new Error(`effect "${name}" was not provided`)));

const idOf = ({ context }: { context: Context }): Keyed => ({ id: context.id });

export const snapshotMachine = setup({
  types: { context: {} as Context, input: {} as Keyed, events: {} as SnapshotEvent, tags: {} as 'busy' },
  actors: {
    prepare: hole<void>('prepare'),
    discard: hole<void>('discard'),
    seal: hole<void>('seal'),
    erase: hole<void>('erase'),
    inspect: hole<Reality>('inspect'),
  },
  actions: {
    keepFailure: assign({
      failure: (_, { error }: { readonly error: unknown }) => (error instanceof Error ? error.message : String(error)),
    }),
    forgetFailure: assign({ failure: null }),
  },
}).createMachine({
  id: 'snapshot',
  initial: 'absent',
  context: ({ input }) => ({ id: input.id, failure: null }),
  states: {
    absent: { on: { PREPARE: 'preparing', VIEW: 'viewing', RECOVER: 'recovering' } },
    preparing: {
      tags: 'busy',
      invoke: {
        id: 'prepare',
        src: 'prepare',
        input: idOf,
        onDone: 'active',
        onError: { target: 'discarding', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    viewing: {
      tags: 'busy',
      invoke: {
        id: 'prepareView',
        src: 'prepare',
        input: idOf,
        onDone: 'view',
        onError: { target: 'discarding', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    /** Undoes a Prepare that failed. What can't be undone now is removed on paper and erased later. */
    discarding: {
      tags: 'busy',
      invoke: { id: 'discard', src: 'discard', input: idOf, onDone: 'absent', onError: 'removed' },
    },
    active: { on: { COMMIT: 'sealing', REMOVE: 'removed', RECOVER: 'recovering' } },
    view: { on: { REMOVE: 'removed', RECOVER: 'recovering' } },
    /** Committed on paper. */
    sealing: {
      tags: 'busy',
      entry: 'forgetFailure',
      invoke: {
        id: 'seal',
        src: 'seal',
        input: idOf,
        onDone: 'committed',
        onError: { target: 'faulty', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    committed: { on: { REMOVE: 'removed', RECOVER: 'recovering' } },
    /** Removed on paper: the name is free, the directory is not deleted yet. */
    removed: { on: { ERASE: 'erasing', RECOVER: 'recovering' } },
    erasing: {
      tags: 'busy',
      entry: 'forgetFailure',
      invoke: {
        id: 'erase',
        src: 'erase',
        input: idOf,
        onDone: 'absent',
        onError: { target: 'removed', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    recovering: {
      tags: 'busy',
      entry: 'forgetFailure',
      invoke: {
        id: 'inspect',
        src: 'inspect',
        input: idOf,
        onDone: [
          { guard: ({ event }) => event.output === Reality.Active, target: 'active' },
          { guard: ({ event }) => event.output === Reality.View, target: 'view' },
          { guard: ({ event }) => event.output === Reality.Committed, target: 'committed' },
          { guard: ({ event }) => event.output === Reality.Uncommitted, target: 'sealing' },
          { guard: ({ event }) => event.output === Reality.Unanswered, target: 'discarding' },
          { guard: ({ event }) => event.output === Reality.Removed, target: 'erasing' },
          { target: 'absent' },
        ],
        onError: { target: 'faulty', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    /** One snapshot in trouble, not the daemon: its failure is kept, it can be looked at again or removed. */
    faulty: { on: { REMOVE: 'removed', RECOVER: 'recovering' } },
  },
});

export type SnapshotState = keyof typeof snapshotMachine.states;
