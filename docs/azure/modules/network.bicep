// The network of those who send runs: it reaches the workspace, the workspace's store,
// the registry and the orchestrator's store, by private endpoints. It reaches no silo's store.
param prefix string
param location string
param workspace string
param workspaceStore string
param orchestratorStore string
param registry string

var suffix = environment().suffixes.storage
var acr = environment().suffixes.acrLoginServer
var names = ['privatelink.api.azureml.ms', 'privatelink.notebooks.azure.net', 'privatelink.blob.${suffix}', 'privatelink${acr}']

resource network 'Microsoft.Network/virtualNetworks@2024-01-01' = {
  name: '${prefix}-runner'
  location: location
  properties: {
    addressSpace: { addressPrefixes: ['10.30.0.0/24'] }
    subnets: [
      {
        name: 'endpoints'
        properties: { addressPrefix: '10.30.0.0/26' }
      }
      {
        name: 'machines'
        properties: { addressPrefix: '10.30.0.64/26' }
      }
    ]
  }
}

resource zones 'Microsoft.Network/privateDnsZones@2020-06-01' = [
  for name in names: {
    name: name
    location: 'global'
  }
]

resource links 'Microsoft.Network/privateDnsZones/virtualNetworkLinks@2020-06-01' = [
  for (name, i) in names: {
    parent: zones[i]
    name: 'runner'
    location: 'global'
    properties: {
      registrationEnabled: false
      virtualNetwork: { id: network.id }
    }
  }
]

module toWorkspace 'endpoint.bicep' = {
  name: 'to-workspace'
  params: {
    name: '${prefix}-to-workspace'
    location: location
    subnet: '${network.id}/subnets/endpoints'
    target: workspace
    kind: 'amlworkspace'
    zones: [zones[0].id, zones[1].id]
  }
}

module toWorkspaceStore 'endpoint.bicep' = {
  name: 'to-workspace-store'
  params: {
    name: '${prefix}-to-workspace-store'
    location: location
    subnet: '${network.id}/subnets/endpoints'
    target: workspaceStore
    kind: 'blob'
    zones: [zones[2].id]
  }
}

module toOrchestrator 'endpoint.bicep' = {
  name: 'to-orchestrator'
  params: {
    name: '${prefix}-to-orchestrator'
    location: location
    subnet: '${network.id}/subnets/endpoints'
    target: orchestratorStore
    kind: 'blob'
    zones: [zones[2].id]
  }
}

module toRegistry 'endpoint.bicep' = {
  name: 'to-registry'
  params: {
    name: '${prefix}-to-registry'
    location: location
    subnet: '${network.id}/subnets/endpoints'
    target: registry
    kind: 'registry'
    zones: [zones[3].id]
  }
}

output machines string = '${network.id}/subnets/machines'
