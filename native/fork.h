// How several threads run: the only thing that a kernel needs from its surroundings. The Python module has OpenMP,
// which PyTorch uses too; the library for an engine has that engine's own threads, which would otherwise compete with
// ours.
#pragma once

namespace secateur {

// Calls part(data, thread, of) for each thread from 0 to of - 1, where `of` is at most `threads`. Those calls may run
// at the same time, and all of them have returned when this returns.
void fork(int threads, void (*part)(void* data, int thread, int of), void* data);

}  // namespace secateur
