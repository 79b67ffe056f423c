/** Life of one device: a snapshot's own writable one, or the read-only one all children of a committed snapshot share.
 * Names its effects; performs none. A failed change leaves the state from which it may be tried again. */
import { assign, fromPromise, setup } from 'xstate';
import { DeviceReality } from './effects.ts';
import type { Keyed } from './snapshot-machine.ts';

interface Context extends Keyed {
  readonly failure: string | null;
}

export const deviceEvents = ['ATTACH', 'FORMAT', 'MOUNT', 'UNMOUNT', 'DETACH', 'SEVER', 'RECOVER'] as const;
export type DeviceEvent = { readonly type: (typeof deviceEvents)[number] };

const hole = <Output>(name: string) =>
  fromPromise<Output, Keyed>(() => Promise.reject(new Error(`effect "${name}" was not provided`)));

const idOf = ({ context }: { context: Context }): Keyed => ({ id: context.id });

export const deviceMachine = setup({
  types: { context: {} as Context, input: {} as Keyed, events: {} as DeviceEvent, tags: {} as 'busy' },
  actors: {
    attach: hole<void>('attach'),
    format: hole<void>('format'),
    mount: hole<void>('mount'),
    unmount: hole<void>('unmount'),
    detach: hole<void>('detach'),
    sever: hole<void>('sever'),
    inspect: hole<DeviceReality>('inspect'),
  },
  actions: {
    keepFailure: assign({
      failure: (_, { error }: { readonly error: unknown }) => (error instanceof Error ? error.message : String(error)),
    }),
  },
}).createMachine({
  id: 'device',
  initial: 'absent',
  context: ({ input }) => ({ id: input.id, failure: null }),
  states: {
    absent: { on: { ATTACH: 'opening', RECOVER: 'recovering' } },
    opening: {
      tags: 'busy',
      invoke: {
        id: 'attach',
        src: 'attach',
        input: idOf,
        onDone: 'attached',
        // An attach may fail after the device came up: take it down before saying that it is absent.
        onError: { target: 'detaching', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    attached: {
      on: { FORMAT: 'formatting', MOUNT: 'mounting', DETACH: 'detaching', RECOVER: 'recovering' },
    },
    formatting: {
      tags: 'busy',
      invoke: {
        id: 'format',
        src: 'format',
        input: idOf,
        onDone: 'attached',
        onError: { target: 'attached', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    mounting: {
      tags: 'busy',
      invoke: {
        id: 'mount',
        src: 'mount',
        input: idOf,
        onDone: 'mounted',
        onError: { target: 'attached', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    mounted: { on: { UNMOUNT: 'unmounting', SEVER: 'severing', RECOVER: 'recovering' } },
    unmounting: {
      tags: 'busy',
      invoke: {
        id: 'unmount',
        src: 'unmount',
        input: idOf,
        onDone: 'attached',
        onError: { target: 'mounted', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    detaching: {
      tags: 'busy',
      invoke: {
        id: 'detach',
        src: 'detach',
        input: idOf,
        onDone: 'absent',
        onError: { target: 'attached', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    /** For a layer that is committed while its client still has it mounted: the file must stop changing. */
    severing: {
      tags: 'busy',
      invoke: {
        id: 'sever',
        src: 'sever',
        input: idOf,
        onDone: 'absent',
        onError: { target: 'mounted', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    recovering: {
      tags: 'busy',
      invoke: {
        id: 'inspect',
        src: 'inspect',
        input: idOf,
        onDone: [
          { guard: ({ event }) => event.output === DeviceReality.Mounted, target: 'mounted' },
          { guard: ({ event }) => event.output === DeviceReality.Attached, target: 'attached' },
          { target: 'absent' },
        ],
        onError: { target: 'faulty', actions: { type: 'keepFailure', params: ({ event }) => event } },
      },
    },
    /** Nobody could say whether it is there: look again before anything else. */
    faulty: { on: { RECOVER: 'recovering' } },
  },
});

export type DeviceState = keyof typeof deviceMachine.states;
