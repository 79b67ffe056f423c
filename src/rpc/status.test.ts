// Invariants: every kind has one code and one text; a message carries its text exactly once; no message, however hostile,
// breaks the wire; docs/errors.md tells the same table.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import { status } from '@grpc/grpc-js';
import fc from 'fast-check';
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import { codeName, statusTable, toStatus } from './status.ts';

describe('status', () => {
  it('appends the class text', () => {
    assert.deepEqual(toStatus(new SnapshotterError(ErrorKind.NotFound, 'snapshot k: does not exist')), {
      code: status.NOT_FOUND,
      details: 'snapshot k: does not exist: not found',
    });
  });

  it('appends it once, also when it is there already', () => {
    const inner = new SnapshotterError(ErrorKind.FailedPrecondition, 'busy: failed precondition');
    assert.equal(toStatus(withContext('remove k', inner)).details, 'remove k: busy: failed precondition');
    assert.equal(toStatus(new SnapshotterError(ErrorKind.NotFound, 'not found')).details, 'not found');
    assert.equal(toStatus(new SnapshotterError(ErrorKind.NotFound, '')).details, 'not found');
  });

  it('makes a foreign error Internal', () => {
    assert.deepEqual(toStatus(new TypeError('x is not a function')), {
      code: status.INTERNAL,
      details: 'x is not a function: internal',
    });
    assert.equal(toStatus('just text').details, 'just text: internal');
  });

  it('bounds any message and keeps it encodable', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(...Object.values(ErrorKind)),
        fc.string({ unit: 'binary', maxLength: 200 }),
        fc.nat(3000),
        (kind, text, times) => {
          const { details, code } = toStatus(new SnapshotterError(kind, `${text}\ud800`.repeat(times)));
          assert.ok(details.length < 4200);
          assert.ok(details.endsWith(statusTable[kind].text));
          assert.equal(code, statusTable[kind].code);
          encodeURI(details);
        },
      ),
      { numRuns: 200 },
    );
  });

  it('gives every kind a code of its own', () => {
    assert.equal(new Set(Object.values(statusTable).map((row) => row.code)).size, Object.values(ErrorKind).length);
    assert.equal(codeName(status.FAILED_PRECONDITION), 'FailedPrecondition');
    assert.equal(codeName(status.OK), 'OK');
  });

  it('is what docs/errors.md says', () => {
    const text = readFileSync(new URL('../../docs/errors.md', import.meta.url), 'utf8');
    const rows = [...text.matchAll(/^\| `([a-z-]+)` \| (\w+) \((\d+)\) \| `: ([a-z ]+)` \|/gm)].map(
      ([, kind, name, code, suffix]) => `${kind} ${name} ${code} ${suffix}`,
    );
    const expected = Object.entries(statusTable).map(
      ([kind, row]) => `${kind} ${codeName(row.code)} ${row.code} ${row.text}`,
    );
    assert.deepEqual(rows, expected);
  });
});
