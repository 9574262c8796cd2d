// Graphs: the work that was submitted while a stream captured.
#include "runtime.h"

using namespace virtual_gpu;

VIRTUAL_GPU_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static uint64_t captures = 0;
  if (id_of(stream).handle == nullptr || is_capturing(stream)) return fail(cudaErrorStreamCaptureInvalidated);
  set_graph(stream, new Graph{{}, ++captures});
  log("CAPTURE\n");
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* handle) {
  Graph* const graph = end_capture(stream);
  *handle = reinterpret_cast<cudaGraph_t>(graph);
  return graph == nullptr ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
#if CUDART_VERSION >= 13000
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                                        unsigned long long* id, cudaGraph_t* handle,
                                                        const cudaGraphNode_t** dependencies,
                                                        const cudaGraphEdgeData** edges, size_t* count) {
  if (edges != nullptr) *edges = nullptr;
#else
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                                           unsigned long long* id, cudaGraph_t* handle,
                                                           const cudaGraphNode_t** dependencies, size_t* count) {
#endif
  Graph* const graph = graph_of(stream);
  *status = graph == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  if (id != nullptr) *id = graph == nullptr ? 0 : graph->id;
  if (handle != nullptr) *handle = reinterpret_cast<cudaGraph_t>(graph);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                             unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  log("REPLAY\n");
  for (const auto& work : reinterpret_cast<Graph*>(executable)->works) submit_again(stream, work);
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->works.size();
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  run_all();
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
