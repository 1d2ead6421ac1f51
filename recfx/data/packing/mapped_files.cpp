// Files mapped into memory that somebody may cut short. A page that is gone is SIGBUS, which ends the process; of the
// mappings that are watched here it becomes zeros and a mark instead. The caller is mapped_files.py.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

extern "C" {
std::atomic<int64_t> recfx_num_replaced{0};  // of all mappings
}

namespace {

struct Mapping {
    std::atomic<uintptr_t> begin{0}, end{0};  // begin 0: free
    std::atomic<int64_t> num_replaced{0};
};

constexpr int64_t MAX_MAPPINGS = 65536;  // Linux lets a process have 65 530
Mapping mappings[MAX_MAPPINGS];
std::atomic<int64_t> num_used{0};  // those from here on were never used
struct sigaction previous;
std::atomic<bool> was_passed_on{false};
uintptr_t page_bytes;

bool replace(uintptr_t address) {
    for (int64_t i = 0; i < num_used.load(); ++i) {
        const uintptr_t begin = mappings[i].begin.load(), end = mappings[i].end.load();
        if (!begin || address < begin || address >= end) continue;
        const uintptr_t page = address / page_bytes * page_bytes;
        void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (zeros == MAP_FAILED) return false;
        mappings[i].num_replaced.fetch_add(1);
        recfx_num_replaced.fetch_add(1);
        return true;
    }
    return false;
}

// One that is not ours goes to the handler before: it is in place when the instruction is tried again.
void on_bus_error(int signal, siginfo_t* info, void*) {
    if (info->si_code > 0 && replace(reinterpret_cast<uintptr_t>(info->si_addr))) return;
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    const bool again = was_passed_on.exchange(true);  // two handlers that pass on to each other would never end
    sigaction(SIGBUS, again ? &standard : &previous, nullptr);
    if (info->si_code <= 0) raise(signal);  // sent by a process
}

void install() {
    struct sigaction now;
    sigaction(SIGBUS, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
    previous = now;
    was_passed_on.store(false);
    struct sigaction ours = {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

extern "C" {

// `number` becomes that of the mapping, -1 when all are taken. The caller lets one thread in at a time.
void recfx_watch(uint8_t* begin, int64_t num_bytes, int64_t* number) {
    page_bytes = sysconf(_SC_PAGESIZE);
    install();
    const auto address = reinterpret_cast<uintptr_t>(begin);
    for (int64_t i = 0; i < MAX_MAPPINGS; ++i) {
        Mapping& mapping = mappings[i];
        if (mapping.begin.load()) continue;
        mapping.num_replaced.store(0);
        mapping.end.store((address + num_bytes + page_bytes - 1) / page_bytes * page_bytes);
        mapping.begin.store(address);
        if (i >= num_used.load()) num_used.store(i + 1);
        *number = i;
        return;
    }
    *number = -1;
}

void recfx_replaced(int64_t number, int64_t* num_replaced) { *num_replaced = mappings[number].num_replaced.load(); }

void recfx_unwatch(int64_t number) { mappings[number].begin.store(0); }

}  // extern "C"
