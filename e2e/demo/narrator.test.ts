import assert from 'node:assert/strict';
import { test } from 'node:test';
import { bytes, duration, Narrator } from './narrator.ts';

function recorded(
  isTty: boolean,
  env: Readonly<Record<string, string>> = {},
): { narrator: Narrator; text: () => string } {
  const text: string[] = [];
  const screen = { write: (part: string) => void text.push(part), isTty, columns: 80 };
  return { narrator: new Narrator(screen, env), text: () => text.join('') };
}

test('without a terminal there is no escape sequence, and facts stand below their step', async () => {
  const { narrator, text } = recorded(false);
  await narrator.step('does it', async () => narrator.command(['ctr', 'run', 'a b']));
  assert.match(text(), /^ {2}✔ does it \.+ \d+ ms\n {6}\$ ctr run 'a b'\n$/);
});

test('NO_COLOR and a dumb terminal are respected', async () => {
  for (const env of [{ NO_COLOR: '1' }, { TERM: 'dumb' }]) {
    const { narrator, text } = recorded(true, env);
    narrator.heading('Title', 'below');
    await narrator.step('does it', async () => undefined);
    assert.equal(text().replaceAll('\r\x1b[2K', '').includes('\x1b'), false);
  }
  const { narrator, text } = recorded(true, { NO_COLOR: '' });
  narrator.heading('Title');
  assert.ok(text().includes('\x1b[1mTitle'));
});

test('a step that fails says so and passes its error on', async () => {
  const { narrator, text } = recorded(false);
  await assert.rejects(
    narrator.step('breaks', () => Promise.reject(new Error('why'))),
    /why/,
  );
  assert.match(text(), /✘ breaks/);
});

test('numbers are for people', () => {
  assert.deepEqual([0, 1023, 1024, 1536, 64 * 2 ** 30].map(bytes), ['0 B', '1023 B', '1 KiB', '1.5 KiB', '64 GiB']);
  assert.deepEqual([3.4, 999, 999.6, 61_234].map(duration), ['3 ms', '999 ms', '1.00 s', '61.23 s']);
});

test('a table lines up', () => {
  const { narrator, text } = recorded(false);
  narrator.table([
    ['', 'dev', 'overlayfs'],
    ['run', '1 ms', '2 ms'],
  ]);
  assert.equal(text(), '        dev  overlayfs\n  run  1 ms       2 ms\n');
});
