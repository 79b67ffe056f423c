/** containerd.services.snapshots.v1.Snapshots over one Worker: translates, decides nothing. */
import { create, type MessageShape } from '@bufbuild/protobuf';
import { EmptySchema } from '@bufbuild/protobuf/wkt';
import { ErrorKind } from '../base/errors.ts';
import {
  ListSnapshotsResponseSchema,
  MountsResponseSchema,
  PrepareSnapshotResponseSchema,
  type Snapshots,
  StatSnapshotResponseSchema,
  UpdateSnapshotResponseSchema,
  UsageResponseSchema,
  ViewSnapshotResponseSchema,
} from '../gen/services/snapshots/v1/snapshots_pb.js';
import type { SnapshotInfo, Worker } from '../worker/worker.ts';
import { parseFilters } from './filter-grammar.ts';
import type { Handlers } from './server.ts';
import {
  commitRequestOf,
  prepareRequestOf,
  requiredName,
  updateRequestOf,
  wireInfoOf,
  wireMountsOf,
  wireSizeMax,
} from './snapshots-codec.ts';

/** A Prepare with this label asks for a layer; AlreadyExists is the answer that it is there. */
const kRefLabel = 'containerd.io/snapshot.ref';

/** containerd's own servers flush every 100. */
export const kListBatch = 100;
/** A quarter of the message limit: labels may be long, a message must not be. */
const kListMessageMaxBytes = 4 * 1024 * 1024;

export function snapshotsHandlers(worker: Worker): Handlers<typeof Snapshots> {
  return {
    prepare: {
      names: ({ key, parent }) => named({ key, parent }),
      expects: ({ labels }) => (Object.hasOwn(labels, kRefLabel) ? ErrorKind.AlreadyExists : null),
      run: async (message, { signal }) =>
        create(PrepareSnapshotResponseSchema, {
          mounts: wireMountsOf(await worker.prepare(prepareRequestOf(message), signal)),
        }),
    },
    view: {
      names: ({ key, parent }) => named({ key, parent }),
      run: async (message, { signal }) =>
        create(ViewSnapshotResponseSchema, {
          mounts: wireMountsOf(await worker.view(prepareRequestOf(message), signal)),
        }),
    },
    mounts: {
      names: ({ key }) => named({ key }),
      run: async ({ key }, { signal }) =>
        create(MountsResponseSchema, { mounts: wireMountsOf(await worker.mounts(requiredName('key', key), signal)) }),
    },
    commit: {
      names: ({ key, name, parent }) => named({ key, name, parent }),
      run: async (message) => {
        await worker.commit(commitRequestOf(message));
        return create(EmptySchema);
      },
    },
    remove: {
      names: ({ key }) => named({ key }),
      run: async ({ key }) => {
        await worker.remove(requiredName('key', key));
        return create(EmptySchema);
      },
    },
    stat: {
      names: ({ key }) => named({ key }),
      run: async ({ key }) =>
        create(StatSnapshotResponseSchema, { info: wireInfoOf(await worker.stat(requiredName('key', key))) }),
    },
    update: {
      names: ({ info }) => named({ key: info?.name ?? '' }),
      run: async (message) =>
        create(UpdateSnapshotResponseSchema, { info: wireInfoOf(await worker.update(updateRequestOf(message))) }),
    },
    list: {
      names: () => ({}),
      run: ({ filters }) => list(worker, filters),
    },
    usage: {
      names: ({ key }) => named({ key }),
      run: async ({ key }) => {
        const { sizeBytes, inodes } = await worker.usage(requiredName('key', key));
        return create(UsageResponseSchema, { size: sizeBytes, inodes });
      },
    },
    cleanup: {
      names: () => ({}),
      run: async () => {
        await worker.cleanup();
        return create(EmptySchema);
      },
    },
  };
}

async function* list(
  worker: Worker,
  filters: readonly string[],
): AsyncIterable<MessageShape<typeof ListSnapshotsResponseSchema>> {
  for await (const batch of worker.list(parseFilters(filters), kListBatch)) {
    for (const part of sized(batch)) yield create(ListSnapshotsResponseSchema, { info: part.map(wireInfoOf) });
  }
}

function* sized(batch: readonly SnapshotInfo[]): Iterable<readonly SnapshotInfo[]> {
  let part: SnapshotInfo[] = [];
  let bytes = 0;
  for (const info of batch) {
    const size = wireSizeMax(info);
    if (part.length === kListBatch || (part.length > 0 && bytes + size > kListMessageMaxBytes)) {
      yield part;
      part = [];
      bytes = 0;
    }
    part.push(info);
    bytes += size;
  }
  if (part.length > 0) yield part;
}

const kLoggedNameMaxChars = 1024;

function named(names: Readonly<Record<string, string>>): Readonly<Record<string, string>> {
  return Object.fromEntries(
    Object.entries(names)
      .filter(([, name]) => name !== '')
      .map(([field, name]) => [field, name.slice(0, kLoggedNameMaxChars)]),
  );
}
