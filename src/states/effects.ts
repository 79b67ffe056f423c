/** What the machines ask the world to do, and what the driver asks the memory to keep. Named here, done in worker/. */

/** What a look at the world said about an open intent. */
export const Reality = {
  /** Nothing of it is left. */
  Absent: 'absent',
  /** The Prepare was never answered: undo it. */
  Unanswered: 'unanswered',
  Active: 'active',
  View: 'view',
  /** Committed on paper; its layer is not finished. */
  Uncommitted: 'uncommitted',
  Committed: 'committed',
  /** Removed on paper; its directory is still there. */
  Removed: 'removed',
} as const;
export type Reality = (typeof Reality)[keyof typeof Reality];

/** Every effect is idempotent: recovery may repeat it. */
export interface SnapshotEffects {
  prepare(id: string, signal: AbortSignal): Promise<void>;
  discard(id: string): Promise<void>;
  /** Finishes a commit: the layer is sealed, the image config written, the usage measured. */
  seal(id: string): Promise<void>;
  erase(id: string): Promise<void>;
  inspect(id: string): Promise<Reality>;
}

export const DeviceReality = { Absent: 'absent', Attached: 'attached', Mounted: 'mounted' } as const;
export type DeviceReality = (typeof DeviceReality)[keyof typeof DeviceReality];

export interface DeviceEffects {
  attach(id: string, signal: AbortSignal): Promise<void>;
  format(id: string): Promise<void>;
  mount(id: string): Promise<void>;
  unmount(id: string): Promise<void>;
  detach(id: string): Promise<void>;
  /** Takes the mounted device from those who have it mounted beside us; what they wrote is kept. */
  sever(id: string): Promise<void>;
  inspect(id: string): Promise<DeviceReality>;
}

/** The persisted record of one life: the last settled state, and the change that was begun after it. */
export interface LifeRecord {
  readonly state: string;
  readonly intent: string | null;
}

export interface Journal {
  /** Unknown = absent, without intent. */
  read(id: string): LifeRecord;
  /** Durable when it returns. */
  intend(id: string, intent: string): void;
  /** Durable when it returns. Closes the intent. */
  settle(id: string, state: string, failure: string | null): void;
}
