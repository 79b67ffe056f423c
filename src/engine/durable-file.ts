/** Whole files, replaced atomically: a reader sees the old text or the new one, a crash leaves one of them. */
import { randomBytes } from 'node:crypto';
import { open, rename, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { fromIo } from './io-errors.ts';

/** Writes beside `path`, makes the bytes durable, then renames. The caller syncs the directory where the rename itself
 * has to survive a power cut. Nothing is left behind on failure (a full disk, say). */
export async function replaceFile(path: string, text: string, mode: number): Promise<void> {
  const temporary = join(dirname(path), `.${basename(path)}.${randomBytes(6).toString('hex')}.new`);
  try {
    const file = await open(temporary, 'wx', mode);
    try {
      await file.chmod(mode); // whatever the umask is
      await file.writeFile(text);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw fromIo(`write ${path}`, error);
  }
}
