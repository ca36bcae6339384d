import './guard.js';

export * from './portable.js';
export { inWorker, type WorkerOptions, type WorkerVerifier } from './worker.js';
