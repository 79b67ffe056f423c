/** Where things are below the root. Pure; the names are contract. Ids only: a client's key is never part of a path. */
import { join } from 'node:path';

export interface SnapshotPaths {
  readonly dir: string;
  readonly fs: string;
  readonly work: string;
  readonly block: string;
  readonly mountPoint: string;
  readonly config: string;
  readonly result: string;
  readonly mark: string;
  readonly data: string;
  readonly index: string;
  readonly sealed: string;
  readonly commit: string;
  readonly imageRef: string;
}

export interface Layout {
  readonly root: string;
  readonly database: string;
  /** The original's metadata; its presence means that directories we do not know are somebody's snapshots. */
  readonly foreignDatabase: string;
  readonly snapshots: string;
  of(id: string): SnapshotPaths;
  /** A directory that is no snapshot's, by name. */
  orphan(name: string): string;
}

export function layoutOf(root: string): Layout {
  const snapshots = join(root, 'snapshots');
  return {
    root,
    database: join(root, 'snapshots.sqlite'),
    foreignDatabase: join(root, 'metadata.db'),
    snapshots,
    orphan: (name) => `${snapshots}/${name}`,
    of: (id) => {
      const dir = `${snapshots}/${id}`;
      const block = `${dir}/block`;
      return {
        dir,
        fs: `${dir}/fs`,
        work: `${dir}/work`,
        block,
        mountPoint: `${block}/mountpoint`,
        config: `${block}/config.v1.json`,
        result: `${block}/init-debug.log`,
        mark: `${block}/backstore_mark`,
        data: `${block}/writable_data`,
        index: `${block}/writable_index`,
        sealed: `${dir}/fs/overlaybd.sealed`,
        commit: `${dir}/fs/overlaybd.commit`,
        imageRef: `${dir}/image_ref`,
      };
    },
  };
}
