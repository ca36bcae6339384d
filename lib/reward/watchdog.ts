import { url as debuggerUrl } from 'node:inspector';
import { Worker } from 'node:worker_threads';

/**
 * How often the thread looks, and how often in a row it has to find the event loop stuck before it cuts off what runs, and then
 * before it ends the process. It counts looks, not seconds: a process that was suspended is not stuck.
 */
const millisecondsBetweenLooks = 250;
const looksBeforeCut = 8;
const looksBetweenCuts = 4;
const looksBeforeEnd = 88;

// Places of the memory that both threads see: seconds of the monotonic clock, and a count.
const deadlinePlace = 0;
const guardedPlace = 1;
const cutsPlace = 2;

/**
 * The program of the thread that watches. A timer of the main thread removes every deadline when it is over, so one that
 * stands there long after says that the event loop does not turn.
 */
const program = `
const { Session } = require('node:inspector');
const { writeSync } = require('node:fs');
const { workerData } = require('node:worker_threads');
const shared = new Float64Array(workerData.memory);
const now = () => Number(process.hrtime.bigint()) / 1e9;
let stuck = 0;
let last = 0;
setInterval(() => {
  const deadline = shared[${deadlinePlace}];
  const isOver = deadline !== 0 && now() > Math.max(deadline, shared[${guardedPlace}]);
  stuck = !isOver ? 0 : deadline === last ? stuck + 1 : 1;
  last = deadline;
  if (stuck >= ${looksBeforeCut} && stuck < ${looksBeforeEnd} && (stuck - ${looksBeforeCut}) % ${looksBetweenCuts} === 0) {
    shared[${cutsPlace}] += 1;
    if (stuck === ${looksBeforeCut}) {
      writeSync(2, 'merf: the time limit of a verifier or environment is over and the event loop does not turn: what ' +
        'runs, mostly a loop behind an await, is cut off\\n');
    }
    // The inspector may call the cut done, and take it back, before the loop has felt it: then the next one ends the loop.
    const session = new Session();
    session.connectToMainThread();
    session.post('Runtime.terminateExecution', () => session.disconnect());
  } else if (stuck === ${looksBeforeEnd}) {
    writeSync(2, 'merf: a verifier or environment holds the process in a loop that cannot be ended, so the process is ' +
      'killed; what was saved stays\\n');
    process.kill(process.pid, 'SIGKILL');
  }
}, ${millisecondsBetweenLooks});
`;

const shared = new Float64Array(new SharedArrayBuffer(3 * Float64Array.BYTES_PER_ELEMENT));
const deadlines = new Set<{ readonly at: number; readonly onLate: () => void }>();
let watching = false;
let cutsHandled = 0;

const now = () => Number(process.hrtime.bigint()) / 1e9;

/** Starts the thread that watches, once for the process; to be called ahead of work whose timing matters. */
export function startWatch(): void {
  if (watching || debuggerUrl() !== undefined) return;
  watching = true;
  new Worker(program, { eval: true, workerData: { memory: shared.buffer }, execArgv: [] }).unref();
}

/**
 * Watches over work that goes on behind an `await`, where the virtual machine's own watchdog does not reach: from a thread
 * of its own, which cuts off whatever the main thread executes once the limit is over and the event loop does not turn.
 * Promises that were about to go on in the same turn may be lost with it.
 *
 * @param onLate told of a loop that was cut off, where the limit is over
 * @returns a function that ends the watch, to be called no later than the limit is over
 */
export function watch(seconds: number, onLate: () => void): () => void {
  // A debugger that holds the process is no loop.
  if (debuggerUrl() !== undefined) return () => undefined;
  startWatch();
  const deadline = { at: now() + seconds, onLate };
  deadlines.add(deadline);
  if (shared[deadlinePlace] === 0 || deadline.at < (shared[deadlinePlace] as number)) {
    shared[deadlinePlace] = deadline.at;
  }
  return () => {
    deadlines.delete(deadline);
    if (shared[deadlinePlace] === deadline.at) {
      let earliest = Number.POSITIVE_INFINITY;
      for (const { at } of deadlines) earliest = Math.min(earliest, at);
      shared[deadlinePlace] = deadlines.size === 0 ? 0 : earliest;
    }
  };
}

/**
 * Tells the watch that the main thread works on something that has a guard of its own, for `seconds` at most.
 * @returns a function that ends that
 */
export function guardedFor(seconds: number): () => void {
  const before = shared[guardedPlace] as number;
  shared[guardedPlace] = now() + seconds;
  return () => {
    shared[guardedPlace] = before;
  };
}

/**
 * Whether a loop has been cut off since the last call, of which everything whose limit is over is told first: the same turn
 * of the event loop may hold more work that would hang as well, before any timer comes to its turn.
 */
export function takeCut(): boolean {
  const cuts = shared[cutsPlace] as number;
  if (cuts === cutsHandled) return false;
  cutsHandled = cuts;
  const time = now();
  for (const { at, onLate } of [...deadlines]) if (at < time) onLate();
  return true;
}
