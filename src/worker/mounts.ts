/** Mounts: the stored recipe again. The answer equals Prepare's; only a device path may be another one by now. */
import { withContext } from '../base/errors.ts';
import { failedPrecondition, replay, type Scope, visible } from './scope.ts';
import type { Mount } from './worker.ts';

export async function mounts(scope: Scope, key: string, signal: AbortSignal): Promise<readonly Mount[]> {
  const row = visible(scope, 'mounts', key);
  if (row.kind === 'committed') throw failedPrecondition(`mounts ${key}: the snapshot is committed`);
  try {
    return await replay(scope, row, signal);
  } catch (error) {
    throw withContext(`mounts ${key} (snapshot ${row.id})`, error);
  }
}
