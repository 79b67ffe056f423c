/** Which mounts of another mount namespace are echoes of ours: services of systemd live in namespaces that receive every
 * mount of the host, and give it back when the host unmounts. An echo holds nothing; a container's own copy does. */
import { readFile } from 'node:fs/promises';
import type { MountEntry } from './engine.ts';

/** What mountinfo says about one mount beyond the table of the addon (proc(5)). */
interface Relation {
  readonly parentId: string;
  readonly place: string;
  /** Peer groups in which it takes part, as a peer or a receiver. */
  readonly groups: readonly string[];
}

const placeOf = (device: string, mountPoint: string): string => `${device} ${mountPoint}`;

function relationsOf(text: string): ReadonlyMap<string, Relation> {
  const relations = new Map<string, Relation>();
  for (const line of text.split('\n')) {
    const [id, parentId, device, , mountPoint, , ...rest] = line.split(' ');
    if (id === undefined || parentId === undefined || device === undefined || mountPoint === undefined) continue;
    // Only white space, backslash and # are escaped: no byte of a letter.
    const decoded = mountPoint.replace(/\\([0-7]{3})/g, (_, octal: string) =>
      String.fromCharCode(Number.parseInt(octal, 8)),
    );
    const optional = rest.slice(0, Math.max(rest.indexOf('-'), 0));
    const groups = optional.flatMap((field) => /^(?:shared|master):(\d+)$/.exec(field)?.[1] ?? []);
    relations.set(id, { parentId, place: placeOf(device, decoded), groups });
  }
  return relations;
}

/** Mounts as `place group`: where they are, and a group through which whoever mounted there told others. */
function announcements(relations: ReadonlyMap<string, Relation>): ReadonlySet<string> {
  const found = new Set<string>();
  for (const { parentId, place } of relations.values()) {
    // An unmount travels through the groups of the mount that lies below, not of the one that goes.
    for (const group of relations.get(parentId)?.groups ?? []) found.add(`${place} ${group}`);
  }
  return found;
}

/** Tells whether an entry of that process's table goes away when we unmount ours. A process that ended has none. */
export async function echoesIn(pid: string): Promise<(entry: MountEntry) => boolean> {
  const read = (who: string): Promise<string> => readFile(`/proc/${who}/mountinfo`, 'utf8');
  const ours = announcements(relationsOf(await read('self')));
  const theirs = [...announcements(relationsOf(await read(pid).catch(() => '')))].filter((each) => ours.has(each));
  const places = new Set(theirs.map((each) => each.slice(0, each.lastIndexOf(' '))));
  return ({ major, minor, mountPoint }) => places.has(placeOf(`${major}:${minor}`, mountPoint));
}
