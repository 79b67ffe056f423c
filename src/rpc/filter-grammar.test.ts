// Invariants: every filter means what containerd's own package says it means (testdata/filters.json was made by running
// it); a bad one is InvalidArgument with a position; whatever the text, parsing and matching end, in linear time.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { SnapshotInfo } from '../worker/worker.ts';
import { parseFilters } from './filter-grammar.ts';

interface Golden {
  readonly infos: readonly Pick<SnapshotInfo, 'kind' | 'name' | 'parent' | 'labels'>[];
  readonly cases: readonly (readonly [filter: string, outcome: readonly number[] | 'refused'])[];
}

const golden = JSON.parse(readFileSync(new URL('testdata/filters.json', import.meta.url), 'utf8')) as Golden;
const infos: readonly SnapshotInfo[] = golden.infos.map((info) => ({ ...info, createdAt: 0n, updatedAt: 0n }));
/** containerd logs these and matches nothing; we say so to the caller. */
const badExpressions = ['name~=/^\\\\/', 'name~=/[/', 'name~=(', 'name~=a*+', 'name~=/(?=a)/'];

function outcome(...filters: string[]): readonly number[] | 'refused' {
  try {
    const matches = parseFilters(filters);
    return infos.flatMap((info, i) => (matches(info) ? [i] : []));
  } catch (error) {
    assert.ok(error instanceof SnapshotterError && error.kind === ErrorKind.InvalidArgument, String(error));
    assert.match(error.message, /position \d+/);
    return 'refused';
  }
}

describe('filter grammar', () => {
  it(`agrees with containerd on ${golden.cases.length} filters`, () => {
    for (const [filter, expected] of golden.cases) {
      assert.deepEqual(outcome(filter), badExpressions.includes(filter) ? 'refused' : expected, JSON.stringify(filter));
    }
  });

  it('matches everything without filters', () => {
    assert.deepEqual(outcome(), [0, 1, 2, 3, 4]);
  });

  it('takes a list as OR and a comma as AND', () => {
    assert.deepEqual(outcome('name==v', 'kind==committed'), [1, 2, 3]);
    assert.deepEqual(outcome('name==v,kind==committed'), []);
    assert.deepEqual(outcome('name==v', 'kind=='), 'refused');
  });

  it('names the byte where reading stopped', () => {
    const position = (text: string): string => {
      try {
        parseFilters([text]);
        return 'accepted';
      } catch (error) {
        return error instanceof Error ? error.message : '';
      }
    };
    assert.equal(position('name==v kind'), 'filter [name==v kind]: position 7: unexpected input');
    assert.equal(position('name==日 x'), 'filter [name==日 x]: position 9: unexpected input');
    assert.equal(position('name=x'), 'filter [name=x]: position 4: unsupported operator "="');
  });

  it('ends on an expression that makes backtracking engines hang', () => {
    const matches = parseFilters(['name~=/^(a+)+$/']);
    const info: SnapshotInfo = { ...(infos[0] as SnapshotInfo), name: `${'a'.repeat(5000)}!` };
    assert.equal(matches(info), false);
  });

  it('refuses lists and filters without bound', () => {
    assert.throws(() => parseFilters(Array.from({ length: 1025 }, () => 'name')), { kind: ErrorKind.InvalidArgument });
    assert.throws(() => parseFilters(['n'.repeat(70_000)]), { kind: ErrorKind.InvalidArgument });
  });

  it('finds any label by its Go-quoted key and value', () => {
    const quoted = (text: string): string =>
      `"${text.replace(/[\\"]/g, '\\$&').replace(/\n/g, '\\n').replaceAll('\0', '\\x00').replaceAll('\ufffd', '\\ufffd')}"`;
    const text = fc.string({ unit: 'grapheme', maxLength: 20 });
    fc.assert(
      fc.property(text, text, (key, value) => {
        const info: SnapshotInfo = { ...(infos[0] as SnapshotInfo), labels: Object.fromEntries([[key, value]]) };
        assert.equal(parseFilters([`labels.${quoted(key)}==${quoted(value)}`])(info), true);
      }),
    );
  });

  it('never throws anything but InvalidArgument', () => {
    const piece = fc.oneof(
      fc.constantFrom(
        'name',
        'labels.',
        '==',
        '!=',
        '~=',
        ',',
        '.',
        '"',
        '/',
        '|',
        '\\',
        '\\x4',
        '(',
        '[',
        ' ',
        '\0',
        '\ufffd',
      ),
      fc.string({ unit: 'binary', maxLength: 5 }),
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        try {
          for (const info of infos) parseFilters([pieces.join('')])(info);
        } catch (error) {
          assert.ok(error instanceof SnapshotterError && error.kind === ErrorKind.InvalidArgument, String(error));
        }
      }),
      { numRuns: 2000 },
    );
  });
});
